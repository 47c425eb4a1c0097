"""Documents are trained on once, whatever is entered twice and whenever a process dies."""

import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from algorithms.mates.scored import chosen, ids_of, pool, words
from ghostgram.algorithms.mates.selection.ids import IdSet, Lookup, binary, name_of
from ghostgram.algorithms.mates.selection.ledger import Ledger
from ghostgram.algorithms.mates.selection.select import select


def test_five_stages_never_take_a_document_or_a_cluster_twice(tmp_path):
    scored = pool(3_000, near=pa.array(np.random.default_rng(0).integers(0, 2_500, 3_000)))
    ledger = Ledger(tmp_path)
    consumed, left = set(), set()
    for stage in range(5):
        options = {"docs": 500, "stage": stage, "one_per": "near", "quotas": {"wiki": (0.05, 0.3)}}
        plan = select([scored], ledger=ledger, **options)
        assert not consumed & {*chosen(plan)}
        near = dict(zip(scored["doc_id"].to_pylist(), scored["near"].to_pylist(), strict=True))
        assert len({near[id] for id in chosen(plan)}) == len(plan) == 500
        ledger.plan(plan, stage)
        left |= consumed & {*chosen(plan)}
        ledger.consume(stage, 400)  # the last hundred were planned and never trained on
        assert chosen(select([scored], ledger=ledger, **options)) == chosen(plan)  # drawn again, it is the same
        consumed |= {*chosen(plan)[:400]}
        assert plan.report["spent"] == 400 * stage
    last = select([scored], docs=3_000, ledger=ledger, stage=5)
    assert {*chosen(last)} == {*scored["doc_id"].to_pylist()} - consumed


def test_a_document_may_be_used_m_times(tmp_path):
    scored = pool(100)
    ledger = Ledger(tmp_path, reuse=2)
    for stage, eligible in enumerate((100, 100, 0)):
        plan = select([scored], docs=100, stage=stage, ledger=ledger)
        assert len(plan) == eligible
        ledger.plan(plan, stage)
        ledger.consume(stage, eligible)


def test_entering_again_changes_nothing(tmp_path):
    ledger, plan = Ledger(tmp_path), select([pool(200)], docs=50)
    ledger.plan(plan, 3)
    for position in (0, 10, 10, 7, 35, 20):
        ledger.consume(3, position)
    ledger.plan(plan, 3)
    assert ledger.consumed(3) == Ledger(tmp_path).consumed(3) == 35
    parts = [pq.read_table(path) for path in sorted(tmp_path.glob("*.parquet"))]
    states = pa.concat_tables(parts).group_by(["state", "stage"]).aggregate([("doc_id", "count_distinct")]).to_pylist()
    assert {(row["state"], row["stage"], row["doc_id_count_distinct"]) for row in states} == {
        ("planned", 3, 50),
        ("consumed", 3, 35),
    }
    assert sum(len(part) for part in parts) == 85
    spent = ledger.spent(4)
    assert spent is not None
    assert spent.has(words(chosen(plan))).tolist() == [True] * 35 + [False] * 15
    assert ledger.spent(3) is None


def test_what_does_not_fit_is_refused(tmp_path):
    ledger, plan = Ledger(tmp_path), select([pool(200)], docs=50)
    with pytest.raises(ValueError, match="reuse: expected at least 1, got 0"):
        Ledger(tmp_path, reuse=0)
    with pytest.raises(ValueError, match="stage: expected one with a plan"):
        ledger.consume(0, 1)
    ledger.plan(plan, 0)
    with pytest.raises(ValueError, match="position: expected 0 to 50, the documents of stage 0, got 51"):
        ledger.consume(0, 51)
    with pytest.raises(ValueError, match="plan: expected the plan that stage 0 has"):
        ledger.plan(select([pool(200)], docs=50, seed=1), 0)


KILLED = """
import os, sys
from pathlib import Path
import pyarrow.parquet
from ghostgram.algorithms.mates.selection.ledger import Ledger
from ghostgram.algorithms.mates.selection.plan import Plan

folder, replace = Path(sys.argv[1]), Path.replace

def dying(moment):
    calls = 0
    def counted(self, target):
        nonlocal calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), 9)
        result = replace(self, target)
        if calls == -moment:
            os.kill(os.getpid(), 9)
        return result
    return counted

def enter(where):
    ledger = Ledger(where)
    ledger.plan(Plan.read(folder / "plan"), 0)
    for position in (10, 20, 30):
        ledger.consume(0, position)

for moment in (1, 2, 4, -1, -2, -3):
    for Path.replace in (dying(moment), replace):
        if child := os.fork():
            print(os.waitpid(child, 0)[1])
        else:
            enter(folder / f"at {moment}")
            os._exit(0)
"""


def test_a_kill_leaves_a_ledger_that_goes_on(tmp_path):
    """Before (1, 2, 4) and after (-1, -2, -3) a file gets its name; then everything is entered again."""
    plan = select([pool(200)], docs=50)
    plan.write(tmp_path / "plan")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, check=True)
    assert [int(line) for line in done.stdout.split()] == [signal.SIGKILL, 0] * 6
    for moment in (1, 2, 4, -1, -2, -3):
        ledger = Ledger(tmp_path / f"at {moment}")
        assert ledger.consumed(0) == 30
        spent = ledger.spent(1)
        assert spent is not None
        assert len(spent) == 30
        assert spent.has(words(chosen(plan)))[:30].all()
        assert {path.suffix for path in ledger.folder.iterdir()} == {".parquet"}  # nothing that was torn is left


# Sets of ids


def test_ids_are_told_apart_by_all_their_bytes():
    rng = np.random.default_rng(0)
    held = rng.integers(0, 2**64, (500, 2), dtype=np.uint64)
    held[1:4, 0] = held[0, 0]  # equal first halves
    held[10, 0], held[11, 0] = 0, 2**64 - 1
    ids = IdSet(np.concatenate([held, held[:50]]))
    assert ids.has(held).all()
    strangers = held.copy()
    strangers[:, 1] ^= np.uint64(1)
    assert not ids.has(strangers).any()
    assert not ids.has(rng.integers(0, 2**64, (10_000, 2), dtype=np.uint64)).any()
    assert not IdSet(held[:0]).has(held).any()


def test_lookup_finds_each_and_no_other():
    rng = np.random.default_rng(1)
    here = rng.integers(0, 2**64, 3_000, dtype=np.uint64)
    asked = np.concatenate([here[::3], rng.integers(0, 2**64, 5_000, dtype=np.uint64), here[:7]])
    lookup = Lookup(here)
    at, place = lookup.find(asked)
    assert at.tolist() == [*range(1_000), *range(6_000, 6_007)]
    np.testing.assert_array_equal(lookup.ids[place], asked[at])


def test_ids_go_to_arrow_and_back():
    ids = ids_of(range(9))
    array = binary(words(ids))
    assert array.to_pylist() == ids
    assert name_of(words(ids)[4]) == ids[4].hex()
