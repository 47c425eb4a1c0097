"""Scores of models: against loops over images, whatever the batch, the same again, and kept run by run."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ghostgram.algorithms.pad import keyed, scorer
from ghostgram.algorithms.pad.convnet import ConvNet, initialised
from ghostgram.algorithms.pad.hardness import MEASURES, forgotten
from ghostgram.algorithms.pad.identity import digest_of
from ghostgram.algorithms.pad.scorer import Training
from ghostgram.algorithms.pad.scores import Scores, score

CLASSES, N = 4, 30
MODEL = partial(ConvNet, 2, CLASSES, width=6, depth=2, size=8)
KINDS = [*MEASURES, "forgetting"]


def data(dtype=torch.float64, n=N):
    """Images whose class is a pattern, a few of them of a wrong label, and of contrasts that differ by far."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(CLASSES, 2, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(n) % CLASSES
    images = patterns[labels] + 0.7 * torch.randn(n, 2, 8, 8, generator=generator, dtype=torch.float64)
    return (images * torch.logspace(-1, 1, n)[:, None, None, None]).to(dtype), labels


def by_loop(kind, model, images, labels):
    """One image after another, by autograd alone."""
    found = []
    for x, y in zip(images[:, None], labels[:, None], strict=True):
        logits = model(x)
        p = logits.softmax(1)
        if kind in ("grand", "grand_last"):
            parameters = [*(model.fc if kind == "grand_last" else model).parameters()]
            gradients = torch.autograd.grad(F.cross_entropy(logits, y), parameters)
            found.append(torch.cat([g.flatten() for g in gradients]).norm())
        elif kind == "el2n":
            found.append((p - F.one_hot(y, CLASSES)).norm())
        elif kind == "margin":
            others = [z for c, z in enumerate(logits[0]) if c != y]
            found.append(max(others) - logits[0, y[0]])
        else:
            found.append(F.cross_entropy(logits, y) if kind == "loss" else -(p * p.log()).sum())
    return torch.stack(found).detach().numpy()


@pytest.mark.parametrize("kind", MEASURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_scores_are_the_mean_over_models_of_what_a_loop_finds(kind, dtype, tolerance):
    images, labels = data(dtype)
    models = [initialised(MODEL, 3, "score model", (run,)).to(dtype) for run in range(2)]
    expected = np.mean([by_loop(kind, model, images, labels) for model in models], axis=0)
    found = score(MODEL, images, labels, kind, runs=2, epoch=0, seed=3)
    np.testing.assert_allclose(found.values, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    assert found.labels.tolist() == labels.tolist()
    assert found.meta["kind"] == kind
    assert found.meta["dataset"] == digest_of(images, labels)


@pytest.mark.parametrize("kind", KINDS)
def test_how_many_are_scored_at_a_time_changes_nothing(kind):
    """Public scores came from losses averaged over a batch: those of a smaller last one looked harder."""
    images, labels = data()
    first, *others = (
        score(MODEL, images, labels, kind, runs=1, epoch=2, at_once=count).values for count in (1, 7, 128, N)
    )
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-12, atol=1e-12)


def test_el2n_and_the_gradient_of_the_last_layer_are_two_scores():
    """Files that are called the one hold the other: they order images differently where features differ in norm."""
    images, labels = data()
    plain, weighted = (score(MODEL, images, labels, kind, runs=1, epoch=0) for kind in ("el2n", "grand_last"))
    assert plain.order(0).tolist() != weighted.order(0).tolist()
    bias_free = nn.Sequential(nn.Flatten(), nn.Linear(128, CLASSES, bias=False)).double()
    by_layer = MEASURES["grand_last"](bias_free)(images, labels)
    expected = MEASURES["el2n"](bias_free)(images, labels) * images.flatten(1).norm(dim=1)
    torch.testing.assert_close(by_layer, expected)
    assert (plain.meta["kind"], weighted.meta["kind"]) == ("el2n", "grand_last")


def test_a_model_whose_logits_no_linear_layer_returns_has_no_last_layer():
    images, labels = data()
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, CLASSES), nn.Softplus()).double()
    with pytest.raises(ValueError, match=r"grand_last: expected a model whose logits are what an nn.Linear returns"):
        MEASURES["grand_last"](model)(images, labels)


def test_of_two_classes_el2n_is_the_others_probability():
    images, labels = data()
    labels = labels % 2
    make = partial(ConvNet, 2, 2, width=6, depth=2, size=8)
    model = initialised(make, 0, "score model", (0,)).double()
    wrong = model(images).softmax(1).gather(1, 1 - labels[:, None])[:, 0]
    found = score(make, images, labels, runs=1, epoch=0).values
    np.testing.assert_allclose(found, math.sqrt(2) * wrong.detach().numpy(), rtol=1e-12)


def test_a_model_is_trained_as_said():
    images, labels = data()
    how = Training(lr=0.05, momentum=0.8, weight_decay=1e-2, batch=8)
    model = initialised(MODEL, 7, "score model", (0,)).double()
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for epoch in range(3):
        order = keyed.permutation(7, "score order", (0, epoch), N)
        for first in range(0, N, 8):
            chosen = order[first : first + 8]
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            gradients = torch.autograd.grad(loss, [*model.parameters()])
            with torch.no_grad():
                for p, g, v in zip(model.parameters(), gradients, velocity, strict=True):
                    v.mul_(0.8).add_(g + 1e-2 * p)
                    p.sub_(0.05 * v)
    expected = by_loop("loss", model, images, labels)
    found = score(MODEL, images, labels, "loss", runs=1, epoch=3, seed=7, training=how)
    np.testing.assert_allclose(found.values, expected, rtol=1e-10)
    assert (found.meta["batch"], found.meta["epoch"]) == (8, 3)


def test_forgetting_counts_the_ways_from_right_to_wrong():
    correct = torch.tensor([[1, 0, 1, 0, 1], [1, 0, 0, 0, 0], [1, 0, 1, 1, 1], [1, 0, 0, 1, 0]], dtype=torch.bool)
    assert forgotten(correct).tolist() == [0, 4, 2, 0, 2]
    images, labels = data()
    found = score(MODEL, images, labels, "forgetting", runs=1, epoch=4, training=Training(lr=0.3))
    assert found.values.max() > 0
    assert (found.values == found.values.round()).all()


def test_wrong_labels_are_hard():
    images, labels = data(torch.float32, 200)
    images = images / images.flatten(1).std(1)[:, None, None, None]
    wrong = torch.arange(200) % 10 == 3
    found = score(MODEL, images, (labels + wrong) % CLASSES, runs=2, epoch=4, training=Training(batch=20))
    hard, easy = found.values[wrong], found.values[~wrong]
    assert np.mean(hard[:, None] > easy[None, :]) > 0.98


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, CLASSES))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_model_scores_in_eval_mode(epoch):
    """Twice the same image has twice the same score, as it would not have under dropout."""
    images, labels = data()
    found = score(Noisy, images.repeat(2, 1, 1, 1), labels.repeat(2), runs=1, epoch=epoch).values
    np.testing.assert_allclose(found[:N], found[N:], rtol=1e-12)


def test_runs_agree_to_the_bit_and_global_randomness_is_left_alone():
    images, labels = data(torch.float32)
    before = torch.get_rng_state()
    first = score(Noisy, images, labels, runs=2, epoch=2).values
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert np.array_equal(score(Noisy, images, labels, runs=2, epoch=2).values, first)
    assert not np.array_equal(score(Noisy, images, labels, runs=2, epoch=2, seed=1).values, first)


def test_models_that_are_done_are_kept(tmp_path, monkeypatch):
    images, labels = data(torch.float32)
    whole = score(MODEL, images, labels, runs=3, epoch=1).values
    train, done = scorer._train, []

    def killed_in_the_third(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(train(*args))

    monkeypatch.setattr(scorer, "_train", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        score(MODEL, images, labels, runs=3, epoch=1, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-0.npz", "run-1.npz"]
    monkeypatch.setattr(scorer, "_train", lambda *args: done.append(train(*args)))
    assert np.array_equal(score(MODEL, images, labels, runs=3, epoch=1, folder=tmp_path).values, whole)
    assert len(done) == 3
    for name, change in [
        ("epoch", {"epoch": 2}),
        ("seed", {"seed": 1}),
        ("lr", {"training": Training(lr=0.1)}),
        ("kind", {"kind": "loss"}),
        ("dataset", {"images": images + 1}),
    ]:
        given = {"images": images, "epoch": 1, **change}
        with pytest.raises(ValueError, match=rf"folder: expected scores of {{'{name}': "):
            score(MODEL, labels=labels, runs=3, folder=tmp_path, **given)


def test_scores_survive_their_file(tmp_path):
    images, labels = data(torch.float32)
    found = score(MODEL, images, labels, runs=1, epoch=1)
    found.save(tmp_path / "scores.npz")
    loaded = Scores.load(tmp_path / "scores.npz")
    assert loaded.meta == found.meta
    assert np.array_equal(loaded.values, found.values)


def test_what_is_wrong_is_named():
    images, labels = data(torch.float32)
    for given, error, message in [
        ({"kind": "vibes"}, ValueError, "kind: expected one of el2n, grand, .*forgetting, got 'vibes'"),
        ({"runs": 0}, ValueError, "runs: expected at least 1, got 0"),
        ({"epoch": -1}, ValueError, "epoch: expected at least 0, got -1"),
        ({"kind": "forgetting", "epoch": 1}, ValueError, "epoch: expected at least 2, got 1"),
        ({"at_once": 0}, ValueError, "at_once: expected at least 1, got 0"),
        ({"training": Training(batch=0)}, ValueError, "batch: expected at least 1, got 0"),
        ({"labels": labels.int()}, TypeError, "labels: expected int64, got torch.int32"),
        ({"labels": labels[1:]}, ValueError, r"labels: expected \(30,\) on cpu, as images, got \(29,\)"),
        ({"images": images[0]}, ValueError, r"images: expected shape \(n, C, H, W\)"),
        ({"images": images.byte()}, TypeError, "images: expected float32, .* got uint8"),
        ({"training": Training(lr=1e30)}, ValueError, "values: expected finite scores, got nan at image 0"),
    ]:
        with pytest.raises(error, match=message):
            score(**{"make_model": MODEL, "images": images, "labels": labels, "runs": 1, "epoch": 2, **given})
