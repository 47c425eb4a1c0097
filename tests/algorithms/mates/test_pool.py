"""The pool reads the same documents from every format, wherever it lies, and names what is wrong by file and row."""

import gzip
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghostgram.algorithms.mates.files.formats import utf8
from ghostgram.algorithms.mates.files.identity import digest_of_bytes, doc_id
from ghostgram.algorithms.mates.files.pool import Pool, PoolError

N = 2500  # three reads


def records(n=N, first=0):
    return [
        {"text": f"{i} naïve \u2028 text " * (i % 5), "key": i, "source": ["web", "code", None][i % 3], "group": None,
         "tokens": i % 7, "more": [i]}
        for i in range(first, first + n)
    ]  # fmt: skip


def parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def json_lines(path, rows):
    data = "\n\n".join(json.dumps(row, ensure_ascii=row["key"] % 2 == 0) for row in rows).encode()
    if path.name.endswith(".gz"):
        data = gzip.compress(data[:99]) + gzip.compress(data[99:])  # of two members, as parallel compressors write
    elif path.name.endswith(".zst"):
        data = pa.Codec("zstd").compress(data[:99], asbytes=True) + pa.Codec("zstd").compress(data[99:], asbytes=True)
    path.write_bytes(data)
    return path


COLUMNS = {"id": "key", "domain": "source", "cluster": "group", "n_tokens": "tokens"}


def table(pool):
    return pa.concat_tables([each for shard in pool.shards for each in pool.documents(shard)])


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("named", [True, False])
def test_every_format_gives_the_same_documents(tmp_path, name, named):
    rows = records()
    path = (
        parquet(tmp_path / name, rows, row_group_size=700) if name == "a.parquet" else json_lines(tmp_path / name, rows)
    )
    pool = pickle.loads(pickle.dumps(Pool(path, **(COLUMNS if named else {}))))
    (shard,) = pool.shards
    assert (shard.path, shard.size, shard.digest) == (
        str(path),
        path.stat().st_size,
        digest_of_bytes(path.read_bytes()),
    )
    tables = list(pool.documents(shard))
    assert max(map(len, tables)) <= 1024
    found = pa.concat_tables(tables).to_pylist()
    nothing = {"domain": None, "cluster_id": None, "n_tokens": None}
    assert found == [
        {"doc_id": doc_id(row["text"], str(row["key"]) if named else None), "text": row["text"], **nothing,
         **({"domain": row["source"], "n_tokens": row["tokens"]} if named else {})}
        for row in rows
    ]  # fmt: skip


def test_bytes_of_strings_are_theirs_in_a_slice_too():
    strings = pa.array(["a", "", "bé", "c"], pa.large_string())
    assert [bytes(each) for each in utf8(strings.slice(1, 2))] == [b"", "bé".encode()]


def test_clusters_are_strings_and_dictionaries_are_read(tmp_path):
    ids = pa.array(["x", None, "x"]).dictionary_encode()
    pq.write_table(pa.table({"text": ["a", "b", "c"], "group": [7, None, 8], "source": ids}), tmp_path / "a.parquet")
    found = table(Pool(tmp_path / "a.parquet", cluster="group", domain="source"))
    assert found["cluster_id"].to_pylist() == ["7", None, "8"]
    assert found["domain"].to_pylist() == ["x", None, "x"]


class Words:
    digest = "words"

    def __call__(self, texts):
        return [len(text.split()) for text in texts]


def test_tokens_are_counted_where_the_pool_does_not_say(tmp_path):
    path = parquet(tmp_path / "a.parquet", records())
    pool = Pool(path, n_tokens=Words())
    assert table(pool)["n_tokens"].to_pylist() == [len(row["text"].split()) for row in records()]
    assert len({pool.digest, Pool(path).digest, Pool(path, n_tokens="tokens").digest}) == 3
    with pytest.raises(PoolError, match=r"a\.parquet: n_tokens: expected 1024 counts"):
        table(Pool(path, n_tokens=lambda texts: [1]))


def test_shards_are_the_sorted_files_that_the_patterns_find(tmp_path):
    for name in ("b.parquet", "deep/er/a.parquet", "odd[1].parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        parquet(tmp_path / name, records(2))
    (tmp_path / "c.parquet").mkdir()
    names = [str(tmp_path / name) for name in ("b.parquet", "deep/er/a.parquet", "odd[1].parquet")]
    patterns = [f"{tmp_path}/**/*.parquet", tmp_path / "b.parquet", f"file://{tmp_path}/odd[1].parquet"]
    for given in (patterns, patterns[::-1]):
        assert [shard.path for shard in Pool(given).shards] == names
    for missing in (f"{tmp_path}/x*.parquet", f"{tmp_path}/c.parquet"):
        with pytest.raises(PoolError, match=r"expected a file or a pattern that finds files"):
            Pool([*names, missing])
    with pytest.raises(PoolError, match="expected files or patterns, got none"):
        Pool([])
    (tmp_path / "a.csv").touch()
    with pytest.raises(PoolError, match=r"a\.csv: expected a file ending in \.parquet"):
        Pool(f"{tmp_path}/a*")


def test_pool_is_named_by_contents_not_by_place(tmp_path):
    for folder, names in (("x", "ab"), ("y", "ab"), ("z", "ba")):
        (tmp_path / folder).mkdir()
        for name, first in zip(names, (0, 5), strict=True):
            parquet(tmp_path / folder / f"{name}.parquet", records(5, first))
    x, y, z = (Pool(f"{tmp_path}/{folder}/*") for folder in "xyz")
    assert x.digest == y.digest
    assert len({x.digest, z.digest, Pool(f"{tmp_path}/x/a*").digest, Pool(f"{tmp_path}/x/*", id="key").digest}) == 4


def test_pool_may_lie_on_any_file_system(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    local = [json_lines(tmp_path / "a.jsonl.zst", records()), parquet(tmp_path / "b.parquet", records(50, N))]
    for path in local:
        fsspec.filesystem("memory").pipe_file(f"/pool/{path.name}", path.read_bytes())
    there, here = Pool("memory://pool/*"), Pool(local)
    assert [shard.path for shard in there.shards] == ["memory:///pool/a.jsonl.zst", "memory:///pool/b.parquet"]
    assert there.digest == here.digest
    assert table(there).equals(table(here))
    with pytest.raises(PoolError, match="memory://pool/c: expected a file"):
        Pool("memory://pool/c")


def test_sample_is_that_of_any_sharding_and_order(tmp_path):
    rows = records(9000)
    whole = Pool(parquet(tmp_path / "whole.parquet", rows), id="key")
    order = np.random.default_rng(0).permutation(len(rows))
    for i, part in enumerate(np.array_split(order, 5)):
        json_lines(tmp_path / f"{i}.jsonl.gz", [rows[j] for j in part])
    parts = Pool(f"{tmp_path}/*.gz", id="key")
    for n in (0, 1, 100, 1500, 9000, 10_000):
        sample = whole.sample(n, seed=3)
        assert len(sample) == min(n, 9000)
        assert sample.equals(parts.sample(n, seed=3))
        assert sample.equals(whole.sample(10_000, seed=3)[:n])
    drawn = [int(text.split()[0]) for text in whole.sample(2000, 3)["text"].to_pylist() if text]
    assert len(set(drawn)) == len(drawn)
    assert np.histogram(drawn, 4, (0, 9000))[0] == pytest.approx(400, abs=90)  # 5 standard deviations
    assert not whole.sample(100, 4).equals(whole.sample(100, 3))
    with pytest.raises(ValueError, match="expected n >= 0 and a seed"):
        whole.sample(-1)


def test_equal_documents_are_sampled_once(tmp_path):
    pool = Pool(parquet(tmp_path / "a.parquet", records(50) * 60))
    texts = pool.sample(3000)["text"].to_pylist()
    assert sorted(texts) == sorted({row["text"] for row in records(50)})


def lines(path, *texts):
    path.write_bytes(b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts))
    return path


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a"', r"line 3: expected JSON"),
        ('["text"]', r"line 3: expected a JSON object, got list"),
        ('{"txt": "a"}', r"line 3: expected the key text, got txt"),
        ('{"text": 5, "n": 1}', r"line 3: text: expected a string, got int"),
        ('{"text": null, "n": 1}', r"line 3: text: expected a value, got null"),
        (r'{"text": "\ud800", "n": 1}', r"line 3: text: no UTF-8 form"),
        (b'{"text": "\xff", "n": 1}', r"line 3: expected JSON"),
        ('{"text": "a", "n": 1.5}', r"line 3: n: expected an integer from 0"),
        ('{"text": "a", "n": true}', r"line 3: n: expected an integer from 0"),
        ('{"text": "a", "n": -1}', r"line 3: n: expected an integer from 0"),
    ],
)
def test_wrong_line_is_named(tmp_path, line, says):
    path = lines(tmp_path / "a.jsonl", '{"text": "a", "n": 1}', "", line)
    with pytest.raises(PoolError, match=rf"a\.jsonl: {says}"):
        table(Pool(path, n_tokens="n"))


def test_wrong_id_or_domain_of_a_line_is_named(tmp_path):
    path = lines(tmp_path / "a.jsonl", '{"text": "a", "x": 1}', '{"text": "a", "x": true}')
    for role in ("id", "domain", "cluster"):
        with pytest.raises(PoolError, match=r"line 2: x: expected a string or an integer, got bool"):
            table(Pool(path, **{role: "x"}))
    path = lines(tmp_path / "a.jsonl", '{"text": "a", "x": 1}', '{"text": "a", "x": null}')
    assert table(Pool(path, domain="x"))["domain"].to_pylist() == ["1", None]
    with pytest.raises(PoolError, match=r"line 2: id: expected a value, got null"):
        table(Pool(path, id="x"))


def bad_utf8(n, at):
    texts = [b"fine"] * n
    texts[at] = b"\xff"
    return pa.array(texts, pa.binary()).view(pa.string())


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"txt": ["a"]}, r"expected the columns text, got txt"),
        ({"text": [5]}, r"row 0: text: expected strings, got int64"),
        ({"text": [b"a"]}, r"row 0: text: expected strings, got binary"),
        ({"text": ["a"] * 1500 + [None]}, r"row 1500: text: expected a value, got null"),
        ({"text": bad_utf8(1500, 1234)}, r"row 1234: text: expected UTF-8"),
        ({"text": ["a"] * 3, "n": [1, 2, -1]}, r"row 2: n_tokens: expected 0 to 2147483647, got -1"),
        ({"text": ["a"] * 2, "n": [1, 2**31]}, r"row 1: n_tokens: expected 0 to 2147483647, got 2147483648"),
        ({"text": ["a"] * 2, "n": [1, None]}, r"row 1: n_tokens: expected a value, got null"),
        ({"text": ["a"], "n": [1.0]}, r"row 0: n_tokens: expected integers, got double"),
        ({"text": ["a"], "id": [1.0]}, r"row 0: id: expected strings or integers, got double"),
    ],
)
def test_wrong_row_is_named(tmp_path, columns, says):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    named = {"n_tokens": "n"} if "n" in columns else {"id": "id"} if "id" in columns else {}
    with pytest.raises(PoolError, match=rf"a\.parquet: {says}"):
        table(Pool(tmp_path / "a.parquet", **named))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
def test_damaged_or_changed_file_is_named(tmp_path, name):
    path = (parquet if name == "a.parquet" else json_lines)(tmp_path / name, records())
    pool, data = Pool(path), path.read_bytes()
    path.write_bytes(data[:-50])
    with pytest.raises(PoolError, match=rf"{name}: changed since the pool was listed"):
        table(pool)
    with pytest.raises(PoolError, match=rf"{name}: cannot be read after (row 0|line \d+): "):
        table(Pool(path))


def test_file_without_documents(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(b"\n \n")
    pool = Pool(f"{tmp_path}/*")
    assert [sum(map(len, pool.documents(shard))) for shard in pool.shards] == [0, 0]
    assert len(pool.sample(5)) == 0
