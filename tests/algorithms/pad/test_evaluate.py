"""Fresh networks are trained as torch's SGD trains them, and every number is computed from what they predict."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from algorithms.pad import tiny
from ghostgram.algorithms.pad import keyed
from ghostgram.algorithms.pad.augment import Dsa
from ghostgram.algorithms.pad.convnet import initialised
from ghostgram.algorithms.pad.evaluate import Evaluation, evaluate

IMAGES, LABELS = tiny.data(12)
TEST, TRUE = tiny.data(300, seed=5)
LOGITS = torch.randn(12, 3, generator=torch.Generator().manual_seed(2)) + 2 * F.one_hot(LABELS, 3)
SHORT = {"nets": 2, "epochs": 7, "batch": 5, "augment": Dsa(1, 8)}


def by_hand(net, targets, beta=0.05, seed=3):
    """torch's own SGD, made anew after the pass with index 4 of 7."""
    model, params = initialised(tiny.MODEL, seed, "evaluation", (net,)), {"momentum": 0.9, "weight_decay": 5e-4}
    sgd = torch.optim.SGD(model.parameters(), lr=beta, **params)
    for epoch in range(7):
        order = torch.tensor(keyed.permutation(seed, "evaluation batches", (net, epoch), 12))
        for step, rows in enumerate(order.split(5)):
            dsa = Dsa(1, 8, stream="dsa evaluation")
            x = dsa.apply(dsa.draw((net, epoch, step), rows), IMAGES[rows])
            loss = F.cross_entropy(model(x), targets[rows])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        if epoch == 4:
            sgd = torch.optim.SGD(model.parameters(), lr=0.1 * beta, **params)
    return model(TEST).argmax(1).numpy()


@pytest.mark.parametrize(("labels", "targets"), [(LOGITS, LOGITS.softmax(1)), (LABELS, LABELS)], ids=["soft", "hard"])
def test_nets_are_those_of_torchs_sgd(labels, targets):
    found = evaluate(tiny.MODEL, IMAGES, labels, 0.05, TEST, TRUE, seed=3, **SHORT)
    for net in range(2):
        assert np.array_equal(found.predictions[net], by_hand(net, targets))
    assert len(np.unique(found.predictions)) == 3


def test_pass_after_which_the_rate_drops_is_501_of_1001(monkeypatch):
    from ghostgram.algorithms.pad import evaluate as module

    monkeypatch.setattr(module, "augmented", lambda dsa, where, images, rows: images[rows])
    monkeypatch.setattr(module, "WEIGHT_DECAY", 0.0)
    monkeypatch.setattr(module, "MOMENTUM", 0.0)

    class Slope:
        gradients = torch.ones(1, 1)

    weights = []

    def gradients(flat, at, x, y):
        weights.append(at.item())
        return Slope

    monkeypatch.setattr(module, "gradients", gradients)
    monkeypatch.setattr(module, "predictions", lambda flat, w, x: torch.zeros(300, dtype=torch.int64))
    monkeypatch.setattr(module, "check_labelled", lambda *_: 3)
    evaluate(partial(torch.nn.Linear, 1, 1, bias=False), IMAGES, LABELS, 1.0, TEST, TRUE, nets=1, batch=12)
    rates = -np.diff(weights)
    assert len(weights) == 1001
    assert np.allclose(rates[:502], 1, atol=1e-3)  # passes 0 to 501
    assert np.allclose(rates[502:], 0.1, atol=1e-3)


def test_nothing_but_the_arguments_decides():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, more = (
        evaluate(tiny.MODEL, IMAGES, LOGITS, 0.05, TEST, TRUE, **{**SHORT, "nets": n}) for n in (2, 2, 3)
    )
    assert np.array_equal(first.predictions, again.predictions)
    assert np.array_equal(first.predictions, more.predictions[:2])
    assert torch.equal(torch.get_rng_state(), state)
    other = evaluate(tiny.MODEL, IMAGES, LOGITS, 0.05, TEST, TRUE, seed=1, **SHORT)
    assert not np.array_equal(first.predictions, other.predictions)


def test_workers_change_nothing_and_groups_only_rounding():
    alone = evaluate(tiny.MODEL, IMAGES, LOGITS, 0.05, TEST, TRUE, **{**SHORT, "nets": 3})
    spread = evaluate(tiny.MODEL, IMAGES, LOGITS, 0.05, TEST, TRUE, **{**SHORT, "nets": 3}, workers=2)
    together = evaluate(tiny.MODEL, IMAGES, LOGITS, 0.05, TEST, TRUE, **{**SHORT, "nets": 3}, group=3)
    assert np.array_equal(alone.predictions, spread.predictions)
    assert (alone.predictions != together.predictions).mean() < 0.01


def test_it_learns_and_says_by_how_much():
    found = evaluate(tiny.MODEL, IMAGES, LABELS, 0.02, TEST, TRUE, nets=3, epochs=60, batch=12, augment=None)
    # The kinds of images of another seed are others: nothing to know about them.
    own, own_labels = tiny.data(120)
    known = evaluate(tiny.MODEL, IMAGES, LABELS, 0.02, own, own_labels, nets=3, epochs=60, batch=12, augment=None)
    assert known.mean > 0.9 > found.mean
    assert np.array_equal(known.accuracies, [(row == own_labels.numpy()).mean() for row in known.predictions])


def test_numbers_are_of_the_predictions():
    found = Evaluation(np.array([[0, 1, 2, 2], [0, 1, 1, 1], [2, 2, 2, 2]]), np.array([0, 1, 2, 0]))
    assert found.accuracies.tolist() == [0.75, 0.5, 0.25]
    assert found.mean == 0.5
    assert found.std == 0.25
    assert math.isnan(Evaluation(found.predictions[:1], found.labels).std)


def test_weights_that_are_not_finite_are_warned_of():
    with pytest.warns(UserWarning, match=r"beta: at 1e\+30 the weights of nets \[0\] are not finite"):
        evaluate(tiny.MODEL, IMAGES, LABELS, 1e30, TEST, TRUE, **{**SHORT, "nets": 1})


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, "beta: expected a positive number, got 0.0"),
        ({"beta": math.nan}, ValueError, "beta: expected a positive number, got nan"),
        ({"nets": 0}, ValueError, "nets: expected at least 1, got 0"),
        ({"epochs": 0}, ValueError, "epochs: expected at least 1"),
        ({"workers": 0}, ValueError, "workers: expected at least 1"),
        ({"group": 0}, ValueError, "group: expected at least 1"),
        ({"labels": LOGITS[:, :2]}, ValueError, r"labels: expected finite logits of 3 classes, got shape \(12, 2\)"),
        ({"labels": LOGITS / 0}, ValueError, "labels: expected finite logits"),
        ({"labels": LABELS[1:]}, ValueError, r"labels: expected shape \(12,\) on cpu, as images"),
        ({"images": IMAGES.double()}, TypeError, "images: expected float32"),
        ({"test_images": TEST[:5]}, ValueError, r"test_labels: expected shape \(5,\)"),
        ({"test_labels": TRUE + 1}, ValueError, "test_labels: expected classes from 0 to 2"),
        ({"make_model": lambda: tiny.MODEL(), "workers": 2}, TypeError, "workers: more than 1 needs a make_model"),
    ],
)
def test_bad_input_is_refused(wrong, error, message):
    given = {"make_model": tiny.MODEL, "images": IMAGES, "labels": LABELS, "beta": 0.1, "test_images": TEST,
             "test_labels": TRUE, **SHORT, **wrong}  # fmt: skip
    with pytest.raises(error, match=message):
        evaluate(**given)
