"""Whole runs: what is selected, what is redone, and that a kill at any moment changes nothing."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ghostgram as gg
from algorithms.mates.models import TASK, reference, trained
from algorithms.mates.training import BATCH, EVERY, STEPS, train, write_pool
from ghostgram.algorithms.mates.dataset import PlanDataset, PlanExhausted
from ghostgram.algorithms.mates.influence.model import load
from ghostgram.algorithms.mates.labels import label as label_stage
from ghostgram.algorithms.mates.selection.ledger import Ledger

OPTIONS = {"docs": 50, "labels": 120, "backend": "exact", "clip": 1.0, "workers": 1, "progress": False}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of 13 steps: stages 0, 1 and 2; on one thread, as in `started`, for torch's sums may depend on that."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_pool(folder / "pool")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return folder, *train(folder)
    finally:
        torch.set_num_threads(threads)


def files(folder):
    """What a run leaves, by name: bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_stage_is_labelled_learnt_scored_and_selected(tmp_path):
    pool, (model, optimizer) = write_pool(tmp_path / "pool"), trained(dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = gg.mates(model, optimizer, pool, reference(), TASK, tmp_path / "run", **OPTIONS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(made.plan) == 50
    assert len(set(made.plan.table["doc_id"].to_pylist())) == 50
    assert made.labels.table.num_rows == 120
    assert made.scorer.digest == load(Path(made.folders["fit"], "model")).digest
    assert Ledger(tmp_path / "run/ledger").consumed(1) == 0


def test_what_is_complete_is_read_and_not_done_again(tmp_path, monkeypatch):
    pool, (model, optimizer) = write_pool(tmp_path / "pool"), trained(dtype=torch.float32)
    first = gg.mates(model, optimizer, pool, reference(), TASK, tmp_path / "run", **OPTIONS)
    before = files(tmp_path / "run")

    def fail(*args, **named):
        raise AssertionError("done again")

    monkeypatch.setattr(label_stage.Rows, "labelled", fail)
    monkeypatch.setattr("ghostgram.algorithms.mates.influence.model.fit", fail)
    monkeypatch.setattr("ghostgram.algorithms.mates.scoring.score.run_units", fail)
    monkeypatch.setattr("ghostgram.algorithms.mates.stages.select", fail)
    again = gg.mates(model, optimizer, pool, reference(), TASK, tmp_path / "run", **OPTIONS)
    assert files(tmp_path / "run") == before
    assert again.plan.table.equals(first.plan.table)
    with pytest.raises(AssertionError, match="done again"):  # another temperature is another selection, of old scores
        gg.mates(model, optimizer, pool, reference(), TASK, tmp_path / "run", temperature=0.5, **OPTIONS)


def test_no_document_is_trained_on_in_two_stages(undisturbed):
    folder, loop, _ = undisturbed
    assert loop.stage == 2
    seen = [loop.ledger.consumed(stage) for stage in range(3)]
    assert seen == [EVERY * BATCH, EVERY * BATCH, (STEPS - 2 * EVERY) * BATCH]
    ids = [read(folder, loop, stage)[: seen[stage]] for stage in range(3)]
    assert len(set(np.concatenate(ids).tolist())) == sum(seen)


def read(folder, loop, stage):
    """The ids of a stage's plan in training order, as the data holds them."""
    path = next(path for number, _, path in loop.data.state_dict(0)["plans"] if number == stage)
    import pyarrow as pa

    return np.array(pa.ipc.open_file(path).read_all()["doc_id"].to_pylist())


def test_the_model_gets_what_the_plan_says(undisturbed):
    folder, loop, _ = undisturbed
    assert read(folder, loop, 2).tolist() == loop.selection.plan.table["doc_id"].to_pylist()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments_a_run_ends_the_same(undisturbed, tmp_path, kills):
    folder, _, model = undisturbed
    write_pool(tmp_path / "pool")
    moments = random.Random(kills)
    written = len(files(folder / "run"))
    for target in sorted(moments.sample(range(1, written), kills)):
        with started(tmp_path) as running:
            while running.poll() is None and sum(path.is_file() for path in (tmp_path / "run").rglob("*")) < target:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.1))
            assert running.poll() is None, f"it ended before it was killed: {running.communicate()[1]}"
            running.kill()
    with started(tmp_path) as running:
        assert running.wait() == 0, running.communicate()[1]
    assert files(tmp_path / "run") == files(folder / "run")
    held = torch.load(tmp_path / "checkpoint.pt", weights_only=False)["model"]
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())


def test_two_processes_train_on_one_plan(tmp_path):
    write_pool(tmp_path / "pool")
    both = [started(tmp_path, str(rank), "2") for rank in range(2)]
    for process in both:
        assert process.wait(timeout=200) == 0, process.communicate()[1]
    states = [torch.load(tmp_path / f"checkpoint.{end}", weights_only=False) for end in ("pt", "1")]
    assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())
    assert states[0]["loop"] == states[1]["loop"]
    assert states[0]["loop"]["stage"] == 2
    ledger = Ledger(tmp_path / "run/ledger")
    assert [ledger.consumed(stage) for stage in range(3)] == [EVERY * BATCH, EVERY * BATCH, (STEPS - 2 * EVERY) * BATCH]


def started(folder, *ranks):
    """The same run in a process of its own."""
    here = Path(__file__).parents[2]
    paths = os.pathsep.join([str(here), str(here.parent / "examples"), *sys.path])
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("training.py")), str(folder), *ranks],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip


def test_an_influence_model_that_still_holds_is_kept(tmp_path):
    write_pool(tmp_path / "pool")
    loop, _ = train(tmp_path, keep_above=-1.0)
    assert loop.stage == 2
    assert "fit" not in loop.selection.folders
    assert set(loop.selection.drift) == {"kept"}


def test_a_model_that_has_drifted_is_replaced_early(tmp_path):
    write_pool(tmp_path / "pool")
    loop, _ = train(tmp_path, steps=9, check_every=2, check=16, refresh_below=1.1)
    assert [step for step, _ in loop.drifts] == [7, 9]  # stage 1 began after step 5
    assert loop.stage == 3


def data(tmp_path, *plans):
    """A dataset of plans, given as lists of texts, that become available after so many documents."""
    import pyarrow as pa

    found = PlanDataset(str)
    for stage, texts in enumerate(plans):
        with pa.ipc.new_file(str(tmp_path / str(stage)), pa.schema({"text": pa.string()})) as writer:
            writer.write_table(pa.table({"text": texts}))
    found.switch(0, tmp_path / "0")
    return found


def test_a_new_plan_begins_with_the_next_document(tmp_path):
    reads = data(tmp_path, list("abcdef"), list("uvwxyz"))
    going = iter(reads)
    assert [next(going) for _ in range(4)] == list("abcd")
    reads.switch(1, tmp_path / "1")
    assert [next(going) for _ in range(2)] == list("uv")
    assert reads.position(3) == {0: 3}  # one of stage 0 was read ahead
    assert reads.position(5) == {0: 4, 1: 1}


def test_documents_that_were_read_ahead_are_read_again(tmp_path):
    reads = data(tmp_path, list("abcdef"), list("uvwxyz"))
    going = iter(reads)
    _ = [next(going) for _ in range(4)]
    reads.switch(1, tmp_path / "1")
    resumed = PlanDataset(str)
    resumed.load_state_dict(reads.state_dict(2))  # trained on two of the four
    going = iter(resumed)
    assert [next(going) for _ in range(4)] == list("cduv")


def test_the_end_of_a_plan_is_an_error(tmp_path):
    reads = iter(data(tmp_path, list("ab")))
    assert [next(reads), next(reads)] == ["a", "b"]
    with pytest.raises(PlanExhausted, match="all 2 documents of stage 0's plan"):
        next(reads)
    with pytest.raises(PlanExhausted, match="before it was given a plan"):
        next(iter(PlanDataset(str)))


@pytest.mark.parametrize(("name", "wrong"), [("every", 0), ("documents_per_step", 0), ("warm_up", 0), ("check", 2)])
def test_numbers_out_of_range_are_named(tmp_path, name, wrong):
    write_pool(tmp_path / "pool")
    with pytest.raises(ValueError, match=f"{name}: expected at least"):
        train(tmp_path, **{name: wrong})
