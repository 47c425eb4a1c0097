"""h - P*G is torch's own step, for every optimizer setting that is supported."""

import itertools

import pytest
import torch

from ghostgram.training.linearize import check_optimizer, linearize, state_is_ready

SGD = [
    dict(lr=0.1, momentum=m, dampening=q, nesterov=n, weight_decay=wd, maximize=mx)
    for m, q, n in [(0, 0, False), (0.9, 0, False), (0.9, 0.3, False), (0.9, 0, True)]
    for wd, mx in itertools.product((0, 0.1), (False, True))
]
ADAM = [
    dict(lr=0.1, weight_decay=wd, amsgrad=ams, maximize=mx)
    for wd, ams, mx in itertools.product((0, 0.1), (False, True), (False, True))
]
SETTINGS = (
    [pytest.param(torch.optim.SGD, s, id=f"SGD-{i}") for i, s in enumerate(SGD)]
    + [pytest.param(torch.optim.Adam, s, id=f"Adam-{i}") for i, s in enumerate(ADAM)]
    + [pytest.param(torch.optim.AdamW, s, id=f"AdamW-{i}") for i, s in enumerate(ADAM)]
    + [pytest.param(torch.optim.AdamW, {"lr": 0.1, "foreach": f}, id=f"AdamW-foreach={f}") for f in (False, True)]
    + [pytest.param(torch.optim.AdamW, {"lr": 0.1, "fused": True}, id="AdamW-fused")]
)


@pytest.mark.parametrize(("kind", "setting"), SETTINGS)
def test_reproduces_the_step(kind, setting):
    """Of several parameters at once; the last one gets its first gradient when the others have moved twice."""
    torch.manual_seed(0)
    ws = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((7, 3), (5,), (2, 4))]
    optimizer = kind(ws, **setting)
    for step in range(5):
        moved = ws if step >= 2 else ws[:2]
        before = [w.detach().clone() for w in moved]
        for w in moved:
            w.grad = torch.randn_like(w)
        steps = linearize(optimizer, optimizer.param_groups[0], moved, [w.grad for w in moved])
        predicted = [(0 if h is None else h) - P * w.grad for w, (P, h) in zip(moved, steps, strict=True)]
        optimizer.step()
        for w, old, delta in zip(moved, before, predicted, strict=True):
            assert (w.detach() - old - delta).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_moment_before_the_batch(kind):
    """v_state="pre" is Adam's formula with the second moment that the state holds, and is not there at first."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = kind([w], lr=0.01)
    assert not state_is_ready(optimizer, w)
    w.grad = torch.randn_like(w)
    optimizer.step()
    assert state_is_ready(optimizer, w)
    v = optimizer.state[w]["exp_avg_sq"]
    ((P, _),) = linearize(optimizer, optimizer.param_groups[0], [w])
    expected = 0.01 * 0.1 / (1 - 0.9**2) / ((v / (1 - 0.999)).sqrt() + 1e-8)
    assert (P - expected).abs().max() < 1e-15


def test_sgd_is_always_ready():
    w = torch.nn.Parameter(torch.zeros(2))
    assert state_is_ready(torch.optim.SGD([w], lr=0.1), w)


def test_other_optimizers_are_refused_by_name():
    with pytest.raises(TypeError, match="expected one of SGD, Adam, AdamW, got Adagrad"):
        check_optimizer(torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(2))]))


def test_state_is_not_changed():
    w = torch.nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([w], lr=0.01, weight_decay=0.1, amsgrad=True)
    w.grad = torch.randn_like(w)
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[w].items()}, w.detach().clone(), w.grad.clone()
    linearize(optimizer, optimizer.param_groups[0], [w])
    linearize(optimizer, optimizer.param_groups[0], [w], [w.grad])
    assert all(torch.equal(optimizer.state[w][k], v) for k, v in before[0].items())
    assert torch.equal(w.detach(), before[1])
    assert torch.equal(w.grad, before[2])
