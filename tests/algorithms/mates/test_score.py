"""Scores come in the order of the pool, from fixed batches, with exact sums; damage is redone or refused."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from algorithms.mates import tiny
from ghostgram.algorithms.mates.files.identity import doc_id
from ghostgram.algorithms.mates.files.pool import Pool
from ghostgram.algorithms.mates.files.store import StoreError
from ghostgram.algorithms.mates.scoring import score as scoring
from ghostgram.algorithms.mates.scoring.engine import EngineError
from ghostgram.algorithms.mates.scoring.score import BATCH, ScoreError, score, scored
from ghostgram.algorithms.mates.sums import ExactSums


def write(path, n, seed, **columns):
    chance = np.random.default_rng(seed)
    texts = [f"{seed} {i} " + "é" * chance.integers(0, 300) for i in range(n)]
    columns = {
        "text": texts,
        "source": chance.choice(["web", "code"], n),
        "n": [len(text) for text in texts],
        **columns,
    }
    types = {"text": pa.string(), "source": pa.string(), "n": pa.int64(), "group": pa.int64()}
    pq.write_table(pa.table(columns, pa.schema({name: types[name] for name in columns})), path)
    return texts


@pytest.fixture
def pool(tmp_path):
    (tmp_path / "pool").mkdir()
    for seed, n in enumerate((700, 0, 300)):
        write(tmp_path / "pool" / f"{seed}.parquet", n, seed)
    return Pool(f"{tmp_path}/pool/*", domain="source", n_tokens="n")


def by_hand(texts):
    """Scores of batches of neighbours in length."""
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i].encode()), i))
    z = {}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        z |= dict(zip(chosen, tiny.Tiny().score([texts[i] for i in chosen]), strict=True))
    return np.array([z[i] for i in range(len(texts))])


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_scores_lie_in_the_order_of_the_pool(tmp_path, pool):
    stage = score(pool, tiny.Tiny(), tmp_path / "run", tiny.load, stage=3, workers=2)
    table = stage.read()
    read = [pq.read_table(shard.path) for shard in pool.shards]
    texts = [part["text"].to_pylist() for part in read]
    assert table.column_names == ["doc_id", "n_tokens", "domain", "z_lambada", "z_code"]
    assert table["doc_id"].to_pylist() == [doc_id(text) for part in texts for text in part]
    assert table["n_tokens"].to_pylist() == [len(text) for part in texts for text in part]
    assert table["domain"].equals(pa.concat_tables(read)["source"])
    z = np.stack([table["z_lambada"].to_numpy(), table["z_code"].to_numpy()], 1)
    assert z.dtype == np.float32
    assert (z == np.concatenate([by_hand(part) for part in texts if part])).all()
    done = stage.committed()
    assert [each.rows for each in done.values()] == [700, 0, 300]
    total = ExactSums()
    for each in done.values():
        total.merge(ExactSums(**each.sums["z_code"]))
    q = [round(float(value) * 2**20) for value in z[:, 1]]
    assert (total.n, total.total, total.squares) == (1000, sum(q), sum(x * x for x in q))
    manifest = stage.require(pool=pool.digest, scorer="tiny-1", references=["lambada", "code"])
    assert (manifest["rows"], manifest["units"], manifest["tokens"]) == (1000, 3, sum(table["n_tokens"].to_pylist()))
    assert stage.folder.startswith(f"{tmp_path}/run/stage-3/score/")
    before = files(stage.folder)
    assert score(pool, tiny.Tiny(), tmp_path / "run", None, stage=3).folder == stage.folder  # nothing left, none loaded
    assert files(stage.folder) == before


def test_what_the_pool_does_not_say_is_null_and_clusters_are_kept(tmp_path):
    write(tmp_path / "a.parquet", 5, 0, group=[1, None, 1, 2, 3])
    (shard,) = (plain := Pool(tmp_path / "a.parquet")).shards
    table = scored(plain, shard, tiny.Tiny())
    assert (table["domain"].null_count, table["n_tokens"].null_count) == (5, 5)
    assert "cluster_id" not in table.column_names
    table = scored(Pool(tmp_path / "a.parquet", cluster="group"), shard, tiny.Tiny())
    assert table["cluster_id"].to_pylist() == ["1", None, "1", "2", "3"]


@pytest.mark.parametrize(("rows", "size"), [(100, 1 << 27), (1 << 15, 9000), (77, 20_000), (1, 1 << 27), (1 << 15, 1)])
def test_windows_do_not_depend_on_how_documents_come(monkeypatch, rows, size):
    chance = np.random.default_rng(0)
    table = pa.table({"text": ["é" * n for n in chance.integers(0, 200, 1000)]})
    monkeypatch.setattr(scoring, "_WINDOW", rows)
    monkeypatch.setattr(scoring, "_WINDOW_BYTES", size)
    expected, held = [], []
    for text in table["text"].to_pylist():
        held.append(text)
        if len(held) == rows or sum(len(each.encode()) for each in held) >= size:
            expected.append(held)
            held = []
    expected += [held] if held else []
    for cuts in ([], [1, 2, 500], range(0, 1000, 7), [0, 0, 999]):
        at = [0, *cuts, 1000]
        pieces = [table[start:stop] for start, stop in pairwise(at)]
        assert [window["text"].to_pylist() for window in scoring._windows(iter(pieces))] == expected


def test_what_is_no_score_is_refused_with_its_ids(tmp_path):
    texts = ["a", "xy", "b", "xz"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    pool = Pool(tmp_path / "a.parquet")
    (shard,) = pool.shards
    named = f"for 2 documents: {doc_id('xy').hex()}, {doc_id('xz').hex()}$"
    with pytest.raises(ScoreError, match=rf"a\.parquet: expected finite scores .*nan.* {named}"):
        scored(pool, shard, tiny.NotFinite())
    with pytest.raises(EngineError, match=rf"unit 000000: {tmp_path}/a\.parquet: expected finite scores"):
        score(pool, tiny.NotFinite(), tmp_path / "run", tiny.load_not_finite, workers=1)
    for wrong in (np.zeros((4, 3), np.float32), np.zeros((4, 2)), np.zeros(4, np.float32)):
        scorer = tiny.Tiny()
        object.__setattr__(scorer, "score", lambda texts, wrong=wrong: wrong)
        with pytest.raises(ScoreError, match=r"a\.parquet: expected float32 scores of shape \(4, 2\)"):
            scored(pool, shard, scorer)
    for references in ((), ("a", "a")):
        object.__setattr__(scorer, "references", references)
        with pytest.raises(ValueError, match="references with names of their own"):
            score(pool, scorer, tmp_path / "run", tiny.load)


def test_damage_is_redone_and_what_means_something_else_refused(tmp_path, pool):
    def again():
        return score(pool, tiny.Tiny(), tmp_path / "run", tiny.load, workers=1)

    folder = Path(again().folder)
    whole = files(folder)
    (folder / "part-000000.parquet").write_bytes(whole["part-000000.parquet"][:999])
    stale = whole["commits/000002.json"].replace(pool.shards[2].digest.encode(), pool.shards[1].digest.encode())
    assert stale != whole["commits/000002.json"]
    (folder / "commits/000002.json").write_bytes(stale)
    again()
    assert files(folder) == whole
    (folder / "manifest.json").write_bytes(whole["manifest.json"].replace(b"higher is", b"lower is"))
    with pytest.raises(StoreError, match=rf"{folder}/manifest\.json: damaged"):
        again()
    (folder / "manifest.json").write_bytes(whole["manifest.json"])
    (folder / "part-000000.parquet").unlink()  # the scorer is needed again, and what is loaded is another one
    with pytest.raises(EngineError, match=r"scorer: expected a scorer of digest tiny-1, got tiny-2"):
        score(pool, tiny.Tiny(), tmp_path / "run", load_other, workers=1)
    for other, scorer in ((pool, tiny.Tiny(2)), (Pool(f"{tmp_path}/pool/1*"), tiny.Tiny())):
        assert Path(score(other, scorer, tmp_path / "run", tiny.load, workers=1).folder).name != folder.name


def load_other(folder):
    return tiny.Tiny(json.loads((folder / "deep" / "tiny.json").read_text())[0] + 1)
