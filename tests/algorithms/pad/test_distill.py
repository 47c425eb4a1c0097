"""The loop: what is drawn, what a step does, what is left out, and that a killed run ends with the same bits."""

import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from algorithms.pad import small
from algorithms.pad.small import SETTINGS
from ghostgram.algorithms.pad import mask, matching
from ghostgram.algorithms.pad.distill import DistillationStopped
from ghostgram.algorithms.pad.matching import Matching, batches, drawn, matches
from ghostgram.algorithms.pad.state import CHECKPOINT, LOG, ChangedError, DistilledState, read_log

TESTS = Path(__file__).parents[2]


def same(one, other):
    """Whether two states agree to the bit, the best iterate included."""
    one, other = dict(vars(one)), dict(vars(other))
    momenta = [each.pop("momenta") for each in (one, other)]
    best = [each.pop("best") for each in (one, other)]
    pairs = [(one, other), momenta, best]
    return all(
        a.keys() == b.keys()
        and all(torch.equal(a[n], b[n]) if isinstance(a[n], torch.Tensor) else a[n] == b[n] for n in a)
        for a, b in pairs
    )


def rows(folder):
    """A log without what it says of time."""
    return [{**row, "seconds": 0} for row in read_log(folder)]


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """What small.py leaves, in a process of one thread: it forks."""
    folder = tmp_path_factory.mktemp("forked")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "algorithms.pad.small", str(folder)]
    done = subprocess.run(command, cwd=TESTS, env=environment, check=True, capture_output=True, text=True)
    return folder, int(done.stdout)


def test_experts_come_in_shuffled_passes():
    settings = replace(SETTINGS, matches=2)
    order = [drawn(settings, 5, it, k)[0] for it in range(10) for k in range(2)]
    passes = [order[at : at + 5] for at in range(0, 20, 5)]
    assert all(sorted(each) == list(range(5)) for each in passes)
    assert len({tuple(each) for each in passes}) > 1


def test_the_bound_of_start_epochs_grows():
    growing = replace(SETTINGS, start_bound=10, start_end=20, expand_iters=1000, expert_epochs=100)
    found = [growing.start_before(it) for it in (0, 99, 100, 199, 500, 999, 1000, 5000)]
    assert found == [10, 10, 11, 11, 15, 19, 20, 20]
    fixed = replace(growing, start_bound=20, expand_iters=None)
    assert fixed.start_before(0) == fixed.start_before(10**6) == 20


def test_start_epochs_stay_below_the_bound_and_all_occur():
    settings = replace(SETTINGS, start_first=2, start_bound=4, start_end=12, expand_iters=300, expert_epochs=100)
    seen = Counter((settings.start_before(it), drawn(settings, 3, it, 0)[1]) for it in range(1500))
    assert all(2 <= start < bound for bound, start in seen)
    assert {start for bound, start in seen if bound == 12} == set(range(2, 12))
    ours = sum(count for (bound, _), count in seen.items() if bound == 12)
    assert all(abs(seen[12, start] - ours / 10) < 5 * math.sqrt(ours * 0.09) for start in range(2, 12))


def test_batches_sweep_without_replacement():
    of_step = batches(SETTINGS, 3, 8, torch.device("cpu"))
    steps = [of_step(i).tolist() for i in range(6)]
    assert [len(each) for each in steps] == [3, 3, 2] * 2
    assert sorted(steps[0] + steps[1] + steps[2]) == sorted(steps[3] + steps[4] + steps[5]) == list(range(8))
    assert steps[:3] != steps[3:]
    assert of_step(4).tolist() == steps[4]  # steps are replayed
    whole = batches(replace(SETTINGS, batch=None), 3, 8, torch.device("cpu"))
    assert whole(0).tolist() == whole(5).tolist() == list(range(8))


@pytest.mark.parametrize("labels", ["learn", "fixed", "hard"])
def test_an_iteration_is_a_step_of_torchs_sgd_on_what_is_learned(tmp_path, labels):
    flat, kept = small.trajectories()
    images, logits = small.start()
    settings = replace(SETTINGS, labels=labels)
    made = logits.argmax(1) if labels == "hard" else logits
    state = DistilledState.new(images, made, settings.beta, labels == "learn")
    names = ["images", "beta"] + ["label_logits"] * (labels == "learn")
    leaves = {name: getattr(state, name).clone().requires_grad_() for name in names}
    rates = {"images": (0.1, 0.5), "beta": (1e-4, 0.5), "label_logits": (0.1, 0.9)}
    optimizers = {n: torch.optim.SGD([leaf], rates[n][0], momentum=rates[n][1]) for n, leaf in leaves.items()}
    for it in range(5):
        current = replace(state, iteration=it, **{n: leaf.detach() for n, leaf in leaves.items()})
        (found,) = matches(Matching(settings, flat, kept, mask.depth(0.25), None), current)
        assert set(found.gradients) == set(names)
        for name, leaf in leaves.items():
            leaf.grad = found.gradients[name]
            optimizers[name].step()
    end = small.run(tmp_path, labels=labels, iterations=5)
    for name, leaf in leaves.items():
        assert torch.equal(getattr(end, name), leaf.detach())
    if labels != "learn":
        assert torch.equal(end.label_logits, made)


def test_several_matches_are_averaged(tmp_path):
    flat, kept = small.trajectories()
    settings = replace(SETTINGS, matches=3, iterations=1, momentum_images=0.0)
    images, logits = small.start()
    found = matches(
        Matching(settings, flat, kept, mask.depth(0.25), None), DistilledState.new(images, logits, 0.05, True)
    )
    assert len({(m.expert, m.start) for m in found}) == 3
    moved = small.run(tmp_path, matches=3, iterations=1).images - images
    expected = -settings.lr_images * sum(m.gradients["images"] for m in found) / 3
    assert torch.allclose(moved, expected, atol=1e-7)


def test_what_matches_badly_changes_nothing(tmp_path):
    images, logits = small.start()
    end = small.run(tmp_path, threshold=1e-6, iterations=9)
    assert (end.tried, end.skipped, end.skipped_in_a_row) == (9, 9, 9)
    assert torch.equal(end.images, images)
    assert torch.equal(end.label_logits, logits)
    assert not any(bool(buffer.any()) for buffer in end.momenta.values())
    assert [row["kept"] for row in read_log(tmp_path) if row["kind"] == "step"] == [0] * 9


def test_a_gradient_that_is_not_finite_is_left_out(tmp_path, monkeypatch):
    real = matching.match

    def match(problem, *arguments, **named):
        found = real(problem, *arguments, **named)
        calls.append(1)
        return found._replace(images=found.images / 0) if len(calls) == 2 else found

    calls = []
    monkeypatch.setattr(matching, "match", match)
    end = small.run(tmp_path, iterations=4)
    assert end.skipped == 1
    assert bool(end.images.isfinite().all())


def test_hopeless_runs_stop_and_say_why(tmp_path):
    with pytest.raises(
        DistillationStopped, match=r"50 matches in a row and 100% of all 50 .* above 1e-06 .* beta 0.05"
    ):
        small.run(tmp_path / "all", threshold=1e-6, iterations=200)
    losses = sorted(row["losses"][0] for row in read_log(tmp_path / "all") if row["kind"] == "step")
    few = losses[len(losses) // 2]
    with pytest.raises(DistillationStopped, match=r"iteration 100: .* of all 100"):
        small.run(tmp_path / "some", threshold=few, lr_images=0.0, lr_labels=0.0, lr_beta=0.0, iterations=200)


def test_beta_has_a_floor(tmp_path):
    with pytest.warns(UserWarning, match="beta: fell below 1e-06"):
        end = small.run(tmp_path, beta=2.0, lr_beta=1e4, iterations=3, threshold=1e9)
    assert float(end.beta) == pytest.approx(1e-6)


def test_equal_snapshots_are_an_error_that_names_them(tmp_path, monkeypatch):
    flat, kept = small.trajectories()
    aliased = small.Kept({place: kept[place[0], 0] for place in kept})
    monkeypatch.setattr(small, "trajectories", lambda: (flat, aliased))
    with pytest.raises(ValueError, match=r"expert \d, epochs \d and \d: .*start: expected to differ from target"):
        small.run(tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def test_unseen_images_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="batch: 1 steps of 3 images see fewer than the 8"):
        small.run(tmp_path, steps=1, iterations=1)


def test_students_come_nearer(tmp_path):
    small.run(tmp_path, iterations=45, start_bound=3, start_end=3, expand_iters=None, lr_images=1.0, validate=None)
    losses = [row["losses"][0] for row in read_log(tmp_path)]
    assert sum(losses[-15:]) < 0.7 * sum(losses[:15])


def test_the_earliest_best_iterate_is_kept(tmp_path):
    said = iter([[0.1, 0.3], [0.4, 0.4], [0.5, 0.3], [0.0, 0.1]])
    end = small.run(tmp_path, eval_every=4, validate=lambda state: next(said))
    assert end.best["iteration"] == 8
    assert end.best["accuracies"] == [0.4, 0.4]
    assert torch.equal(end.best["images"], small.run(tmp_path / "8", iterations=8, validate=None).images)
    validated = [(row["iteration"], row["accuracies"]) for row in read_log(tmp_path) if row["kind"] == "validation"]
    assert validated == [(4, [0.1, 0.3]), (8, [0.4, 0.4]), (12, [0.5, 0.3]), (15, [0.0, 0.1])]


def test_global_random_states_are_left_alone(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    state = random.getstate()
    end = small.run(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == state
    torch.manual_seed(4)
    assert same(end, small.run(tmp_path / "b"))
    assert not torch.equal(end.images, small.run(tmp_path / "c", seed=8).images)


@pytest.mark.parametrize("stop", [7, 8])  # between checkpoints, and at one
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, stop):
    class Stop(Exception):
        pass

    def told(state):
        if state.iteration == stop:
            raise Stop

    end = small.run(tmp_path / "through")
    with monkeypatch.context() as patched:
        patched.setattr(small.time, "sleep", lambda nap: None)
        real = small.Course
        patched.setattr(small, "Course", lambda *arguments: real(*arguments[:-1], told))
        with pytest.raises(Stop):
            small.run(tmp_path / "stopped")
    with open(tmp_path / "stopped" / LOG, "a") as log:
        log.write('{"kind": "step", "iter')  # torn
    again = small.run(tmp_path / "stopped")
    assert same(end, again)
    assert rows(tmp_path / "through") == rows(tmp_path / "stopped")
    assert same(end, small.run(tmp_path / "stopped"))  # there is nothing left to do


def test_a_longer_run_continues_if_it_may(tmp_path):
    small.run(tmp_path / "a", iterations=6)
    with pytest.raises(ChangedError, match=r"iterations: 6 before, 15 now.*allow_changes"):
        small.run(tmp_path / "a")
    end = small.run(tmp_path / "a", allow_changes=("iterations",))
    assert same(end, small.run(tmp_path / "b"))


def test_killed_runs_end_with_the_same_bits(forked):
    folder, kills = forked
    assert kills >= 2
    settings = replace(SETTINGS, iterations=small.STORM).as_json()
    ends = [DistilledState.load(folder / name, settings, (), torch.device("cpu")) for name in ("killed", "through")]
    assert same(*ends)
    assert rows(folder / "killed") == rows(folder / "through")


def test_two_processes_give_the_bits_of_one(forked):
    folder, _ = forked
    ends = [DistilledState(**torch.load(folder / f"{name}.pt")) for name in ("alone", "0", "1")]
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])
    assert rows(folder / "alone") == rows(folder / "both")
