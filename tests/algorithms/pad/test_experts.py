"""Experts are trained as the formulas say, by their seed alone, and go on to the same bits where they were killed."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from algorithms.pad import storm, tiny
from algorithms.pad.tiny import files, recorded
from ghostgram.algorithms.pad import keyed
from ghostgram.algorithms.pad.augment import Dsa
from ghostgram.algorithms.pad.convnet import initialised
from ghostgram.algorithms.pad.experts import Recipe
from ghostgram.algorithms.pad.schedule import DifficultySchedule
from ghostgram.algorithms.pad.scores import Scores
from ghostgram.algorithms.pad.store import Store, StoreError
from ghostgram.algorithms.pad.trainer import DivergedError

TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    recorded(folder)
    return folder


def schedule():
    """Of 30 images of three classes: 21 in epoch 0, 24 in epoch 1, all in epoch 2."""
    _, labels = tiny.data()
    return DifficultySchedule(Scores(np.arange(30.0)[::-1].copy(), labels.numpy(), {"kind": "test"}), ".7", 2)


def grads(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters()]


def by_hand(expert, seed=0, lr=0.01, rho=0.01, alpha=0.3):
    """An expert of the scheduled recipe, with torch's modules and lists of tensors."""
    images, labels = tiny.data()
    model = initialised(tiny.MODEL, seed, "expert", (expert,))
    for epoch in range(3):
        kept = schedule().indices(epoch)
        order = kept[keyed.permutation(seed, "expert batches", (expert, epoch), len(kept))]
        for step, first in enumerate(range(0, len(order), 16)):
            rows, dsa = order[first : first + 16], Dsa(3, 8, stream="dsa expert")
            x, y = dsa.apply(dsa.draw((expert, epoch, step), rows), images[rows]), labels[rows]
            w, g = [p.detach().clone() for p in model.parameters()], grads(model, x, y)
            length = sum(((a * b) ** 2).sum() for a, b in zip(w, g, strict=True)).sqrt()
            with torch.no_grad():
                for p, a, b in zip(model.parameters(), w, g, strict=True):
                    p.copy_(a + rho * a**2 * b / (length + 1e-12))
            h = grads(model, x, y)
            along = sum((a * b).sum() for a, b in zip(g, h, strict=True)) / sum((b**2).sum() for b in h)
            with torch.no_grad():
                for p, a, b, c in zip(model.parameters(), w, g, h, strict=True):
                    p.copy_(a - lr * (c - alpha * (b - along * c)))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("group", [1, 2])
def test_experts_are_those_of_a_loop_by_hand(tmp_path, group):
    store = recorded(tmp_path, recipe="pad", schedule=schedule(), group=group)
    assert store.header["images"] == [21, 24, 30]
    for expert in range(2):
        hand, moved = by_hand(expert), store[expert, 3] - store[expert, 0]
        error = np.linalg.norm(store[expert, 3] - hand.numpy()) / np.linalg.norm(moved)
        assert error < 1e-5


def test_mtt_experts_are_those_of_torchs_sgd(tmp_path):
    store = recorded(tmp_path, recipe="mtt", augment=None, experts=1)
    images, labels = tiny.data()
    model = initialised(tiny.MODEL, 0, "expert", (0,))
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    for epoch in range(3):
        for rows in np.split(keyed.permutation(0, "expert batches", (0, epoch), 30), [16]):
            sgd.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            sgd.step()
    hand = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    np.testing.assert_allclose(store[0, 3], hand, rtol=1e-5, atol=1e-6)


def test_snapshots_are_copies_and_experts_their_own(whole):
    store = Store.open(whole)
    rows = [store[expert, epoch] for expert in range(2) for epoch in range(4)]
    for i, row in enumerate(rows):
        assert all(np.square(row - other).sum() > 1e-6 for other in rows[:i])


def test_nothing_but_the_arguments_decides(whole, tmp_path):
    before = torch.get_rng_state()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    mine, theirs = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    recorded(tmp_path / "again")
    assert files(tmp_path / "again") == files(whole)
    assert torch.equal(torch.get_rng_state(), mine)
    assert np.array_equal(np.random.get_state()[1], theirs)  # noqa: NPY002
    torch.set_rng_state(before)
    assert not np.array_equal(recorded(tmp_path / "other", seed=1)[0, 0], Store.open(whole)[0, 0])


def test_an_expert_does_not_depend_on_others_or_on_what_is_kept(whole, tmp_path):
    store = recorded(tmp_path, experts=1, keep=[1])
    assert store.epochs == (1, 3)
    assert np.array_equal(store[0, 1], Store.open(whole)[0, 1])
    assert np.array_equal(store[0, 3], Store.open(whole)[0, 3])


def test_groups_change_results_by_rounding_only(whole, tmp_path):
    alone, together = Store.open(whole), recorded(tmp_path, group=2)
    np.testing.assert_allclose(together[1, 3], alone[1, 3], rtol=1e-4, atol=1e-6)
    assert together.header["group"] == 2


def test_accuracy_is_that_on_the_validation_set_where_there_is_one(tmp_path):
    images, labels = tiny.data(40, seed=7)
    store = recorded(tmp_path, experts=1, validation=(images, labels))
    model = tiny.MODEL()
    for epoch in range(4):
        torch.nn.utils.vector_to_parameters(torch.tensor(store[0, epoch]), model.parameters())
        assert store.accuracy[0, epoch] == (model(images).argmax(1) == labels).double().mean()
    assert store.header["accuracy"] == "validation"


def test_loss_is_the_mean_over_the_epoch(tmp_path):
    store = recorded(tmp_path, recipe=Recipe(lr=1e-12, rho=0.0), experts=1, augment=None)
    images, labels = tiny.data()
    logits = initialised(tiny.MODEL, 0, "expert", (0,))(images)
    assert store.loss[0, 1:].tolist() == pytest.approx([F.cross_entropy(logits, labels).item()] * 3, rel=1e-5)
    assert store.accuracy[0, 2] == (logits.argmax(1) == labels).double().mean()


def test_what_a_model_draws_is_keyed_too(tmp_path):
    state = torch.get_rng_state()
    first, again = (recorded(tmp_path / name, make_model=tiny.WithDropout, experts=2) for name in "ab")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), state)
    assert not np.array_equal(first[0, 3], recorded(tmp_path / "c", make_model=tiny.WithDropout, seed=9)[0, 3])
    assert again.experts == 2
    with pytest.raises(RuntimeError, match="random"):
        recorded(tmp_path / "d", make_model=tiny.WithDropout, group=2)


# --------------------------------------------------------------------------------------------- killed, and going on


def run(*arguments):
    done = subprocess.run(
        [sys.executable, storm.__file__, *map(str, arguments)], env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_process_killed_at_every_moment_around_a_write_costs_nothing(tmp_path):
    moments = run("every", tmp_path / "killed")
    assert moments > 20
    recorded(tmp_path / "whole", **tiny.SHORT)
    for moment in range(moments):
        assert files(tmp_path / "killed" / str(moment)) == files(tmp_path / "whole"), moment


def test_two_processes_that_share_a_store_may_be_killed_at_any_time(whole, tmp_path):
    assert run("any", tmp_path, 15) == 15
    assert files(tmp_path) == files(whole)


def test_workers_give_the_same_bytes_and_die_with_their_parent(tmp_path):
    long = {"epochs": 80, "keep": [0, 20]}
    run_ = subprocess.Popen(
        [sys.executable, storm.__file__, "workers", str(tmp_path / "killed"), json.dumps(long)],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    log, until = tmp_path / "killed" / "done.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") > 4):
        assert run_.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    workers = children(run_.pid)
    run_.kill()
    run_.wait()
    assert len(workers) >= 2
    while any(map(alive, workers)):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert log.read_bytes().count(b"\n") < 2 * 81  # else it came too late
    recorded(tmp_path / "killed", **long)
    recorded(tmp_path / "whole", **long)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def stat(process):
    """State and parent of a process; None if there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None


def alive(process):
    return (stat(process) or "Z")[0] != "Z"


def children(parent):
    every = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [process for process in every if (found := stat(process)) and int(found[1]) == parent]


def test_stopped_inside_an_expert_it_goes_on_from_the_last_epoch(whole, tmp_path, monkeypatch):
    from ghostgram.algorithms.pad import trainer

    trained = []
    real = trainer.Trainer._epoch

    def stopping(self, flat, experts, epoch, weights):
        if (experts[0], epoch) == (1, 1) and len(trained) == 4:
            raise KeyboardInterrupt
        trained.append((experts[0], epoch))
        return real(self, flat, experts, epoch, weights)

    monkeypatch.setattr(trainer.Trainer, "_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        recorded(tmp_path)
    trained.append("stopped")
    recorded(tmp_path)
    assert trained == [(0, 0), (0, 1), (0, 2), (1, 0), "stopped", (1, 1), (1, 2)]
    assert files(tmp_path) == files(whole)
    recorded(tmp_path)  # finished: nothing is trained
    assert len(trained) == 7


def test_damaged_row_is_trained_again_and_said(whole, tmp_path):
    recorded(tmp_path)
    rows = bytearray((tmp_path / "experts.bin").read_bytes())
    rows[-5] ^= 1
    (tmp_path / "experts.bin").write_bytes(rows)
    with pytest.warns(UserWarning, match=r"experts\.bin: expert 1, epoch 3 is not what was recorded: experts 1 to 1"):
        recorded(tmp_path)
    assert files(tmp_path) == files(whole)


def test_store_of_something_else_is_not_gone_on_with(whole, tmp_path):
    recorded(tmp_path)
    before = files(tmp_path)
    images, labels = tiny.data()
    others = {
        "seed": {"seed": 4}, "epochs": {"epochs": 5}, "batch": {"batch": 7}, "group": {"group": 2},
        "augment": {"augment": Dsa(4, 8)}, "dataset": {"data": (images + 1e-6, labels)}, "recipe": {"recipe": "ftd"},
        "facts": {"facts": {"zca": 1}}, "kept": {"keep": [1]},
    }  # fmt: skip
    for name, other in others.items():
        with pytest.raises(StoreError, match=rf"header\.json: {name}: expected"):
            recorded(tmp_path, **other)
    assert files(tmp_path) == before


def test_other_circumstances_are_warned_of(tmp_path, monkeypatch):
    recorded(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded(tmp_path)
    monkeypatch.setattr(torch, "__version__", "1.0")
    with pytest.warns(UserWarning, match=r"begun with torch .*, now 1\.0: what is trained now may differ"):
        recorded(tmp_path)


def test_log_without_its_header_is_refused(tmp_path):
    recorded(tmp_path)
    (tmp_path / "header.json").unlink()
    with pytest.raises(StoreError, match=r"header\.json: does not exist, but done\.jsonl says"):
        recorded(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"recipe": "PAD"}, ValueError, "recipe: expected one of pad, datm, ftd, mtt"),
        ({"recipe": "pad"}, ValueError, "schedule: this recipe's scheduled is True: expected a DifficultySchedule"),
        ({"schedule": "s"}, ValueError, "schedule: this recipe's scheduled is False: expected None"),
        ({"experts": 0}, ValueError, "experts: expected at least 1, got 0"),
        ({"epochs": 0}, ValueError, "epochs: expected at least 1, got 0"),
        ({"batch": 0}, ValueError, "batch: expected at least 1, got 0"),
        ({"group": -1}, ValueError, "group: expected at least 1, got -1"),
        ({"keep": [0, 4]}, ValueError, "keep: expected epochs from 0 to 3, got 0 to 4"),
        ({"dtype": "bfloat16"}, ValueError, "dtype: expected float32 or float16, got 'bfloat16'"),
        ({"workers": 0}, ValueError, "workers: expected 1, or more on a CPU, got 0"),
        ({"workers": 2, "make_model": lambda: tiny.MODEL()}, TypeError, "workers: more than 1 needs a make_model"),
        ({"recipe": Recipe(rho=-1)}, ValueError, "rho: expected a finite number"),
        ({"data": (tiny.data()[0].double(), tiny.data()[1])}, TypeError, "images: expected float32, got torch.float64"),
        ({"data": (tiny.data()[0][:, 0], tiny.data()[1])}, ValueError, r"images: expected shape \(n, C, H, W\)"),
        ({"data": (tiny.data()[0] / 0, tiny.data()[1])}, ValueError, "images: expected finite numbers"),
        ({"data": (tiny.data()[0], tiny.data()[1][1:])}, ValueError, r"labels: expected shape \(30,\) on cpu"),
        ({"data": (tiny.data()[0], tiny.data()[1] + 1)}, ValueError, "labels: expected classes from 0 to 2, .* got 3"),
        ({"data": (tiny.data()[0], tiny.data()[1].int())}, TypeError, "labels: expected int64, got torch.int32"),
        ({"validation": (tiny.data()[0], tiny.data()[1] - 1)}, ValueError, "validation labels: expected classes"),
        ({"recipe": "pad", "schedule": schedule(), "data": tiny.data(20)}, ValueError, "schedule: epoch 0 has image 2"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, wrong, error, message):
    with pytest.raises(error, match=message):
        recorded(tmp_path / "store", **wrong)
    assert not (tmp_path / "store").exists()


def test_weights_that_cannot_be_kept_end_the_run_with_their_place(tmp_path):
    with pytest.raises(DivergedError, match=r"expert 0, epoch 1: expected finite weights in float32: lr 1e\+30"):
        recorded(tmp_path / "a", recipe=Recipe(lr=1e30))
    with pytest.raises(DivergedError, match="epoch 1: expected finite weights in float16"):
        recorded(tmp_path / "b", recipe=Recipe(lr=1e7, rho=0.0), dtype="float16", batch=30)
