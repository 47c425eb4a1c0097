"""Flat vectors and the student: layouts, counts, refusals, and initialisation that touches nothing global."""

import pytest
import torch
from torch import nn

from ghostgram.algorithms.pad.convnet import ConvNet, initialised
from ghostgram.algorithms.pad.flat import Flat


@pytest.mark.parametrize(
    ("form", "count"),
    [
        ({"channels": 3, "classes": 10}, 320_010),
        ({"channels": 3, "classes": 100}, 504_420),
        ({"channels": 3, "classes": 200, "depth": 4, "size": 64}, 857_160),
        ({"channels": 1, "classes": 10, "size": 28}, 317_706),
        ({"channels": 1, "classes": 10, "width": 32, "size": 28}, 24_138),
        ({"channels": 1, "classes": 10, "width": 32, "depth": 2, "size": 8}, 10_986),
    ],
)
def test_counts(form, count):
    net = ConvNet(**form)
    flat = Flat(net)
    assert flat.P == flat.offsets[-1] == count
    assert flat.names == tuple(name for name, _ in net.named_parameters())
    assert [name.split(".")[-2:] for name in flat.names[:4]] == [
        ["conv", "weight"], ["conv", "bias"], ["norm", "weight"], ["norm", "bias"]
    ]  # fmt: skip
    assert torch.equal(flat.vector(net), torch.cat([p.reshape(-1) for p in net.parameters()]))


@pytest.mark.parametrize(("size", "depth"), [(8, 1), (8, 2), (8, 3), (28, 3), (9, 2), (64, 5)])
def test_any_size_gives_the_features_that_were_declared(size, depth):
    net = ConvNet(1, 3, width=4, depth=depth, size=size)
    assert net(torch.rand(2, 1, size, size)).shape == (2, 3)
    assert [block.conv.padding for block in net.blocks] == [(3, 3) if size == 28 else (1, 1)] + [(1, 1)] * (depth - 1)


@pytest.mark.parametrize(
    ("form", "match"),
    [
        ({"size": 8, "depth": 4}, "depth: expected every norm to see maps of 2x2 or more, got depth 4 at size 8"),
        ({"width": 0}, "width: expected at least 1, got 0"),
    ],
)
def test_impossible_students_are_refused(form, match):
    with pytest.raises(ValueError, match=match):
        ConvNet(3, 10, **form)


def test_logits_are_the_models_own_at_any_weights():
    one, other = (initialised(lambda: ConvNet(3, 4, 8, 2, 8), 0, "net", (i,)) for i in range(2))
    flat, x = Flat(one), torch.rand(5, 3, 8, 8)
    weights = torch.stack([flat.vector(one), flat.vector(other)])
    assert torch.equal(flat.logits(weights[1], x), other(x))
    both = torch.vmap(lambda theta: flat.logits(theta, x))(weights)
    assert torch.allclose(both, torch.stack([one(x), other(x)]), atol=1e-6)
    copy = flat.vector(one)
    flat.load(one, weights[1])
    assert torch.equal(one(x), other(x))
    assert torch.equal(copy, weights[0])  # a vector is a copy: training on does not change it


def test_views_share_memory_and_graph():
    flat = Flat(nn.Linear(3, 2))
    theta = torch.arange(8.0, requires_grad=True)
    views = flat.views(theta)
    assert [view.data_ptr() for view in views.values()] == [theta.data_ptr(), theta.data_ptr() + 6 * 4]
    (views["weight"].sum() + 2 * views["bias"].sum()).backward()
    assert theta.grad.tolist() == [1] * 6 + [2] * 2


def test_a_frozen_parameter_stays_and_a_shared_one_counts_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    net[2].requires_grad_(False)
    flat, x = Flat(net), torch.rand(2, 3)
    assert flat.names == ("0.weight", "0.bias", "1.bias")
    theta = torch.rand(flat.P)
    hidden = (x @ theta[:9].view(3, 3).T + theta[9:12]) @ theta[:9].view(3, 3).T + theta[12:]
    assert torch.allclose(flat.logits(theta, x), net[2](hidden), atol=1e-6)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_a_forward_that_changes_buffers_is_refused_and_changes_none(norm):
    net = nn.Sequential(nn.Linear(3, 2), nn.Unflatten(1, (2, 1)), nn.Upsample(3), norm(2, track_running_stats=True))
    flat, x = Flat(net), torch.rand(4, 3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"module: expected a forward that changes no buffer, got .*'3\.running"):
            flat.logits(flat.vector(net), x)
    assert torch.equal(net[3].running_mean, torch.zeros(2))
    net.eval()
    assert torch.equal(Flat(net).logits(flat.vector(net), x), net(x))


def test_bad_input_is_named():
    flat = Flat(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"theta: expected shape \(8,\), got \(9,\)"):
        flat.logits(torch.zeros(9), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"module: expected the trainable parameters .* got \{'weight': \(2, 4\)"):
        flat.load(nn.Linear(4, 2), torch.zeros(8))
    with pytest.raises(ValueError, match="module: expected at least one trainable parameter, got none"):
        Flat(nn.ReLU())
    with pytest.raises(ValueError, match="module: expected parameters of one dtype on one device, got "):
        Flat(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, dtype=torch.float64)))


def test_initial_weights_are_the_keys_and_global_state_is_untouched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (initialised(lambda: ConvNet(1, 2, 4, 1, 8), 3, "expert", (i,)) for i in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    flat = Flat(one)
    assert torch.equal(flat.vector(one), flat.vector(same))
    assert not torch.equal(flat.vector(one), flat.vector(other))
