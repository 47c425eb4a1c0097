"""The pooling of ConvNet is AvgPool2d(2), forwards, backwards and along a direction, even sizes or odd."""

import pytest
import torch
from torch import nn

from ghostgram.algorithms.pad.convnet import ConvNet, Halving


@pytest.mark.parametrize("size", [(8, 8), (2, 2), (4, 6), (7, 7), (6, 5), (3, 2)])
def test_halving_is_average_pooling(size):
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, *size, generator=chance, dtype=torch.float64, requires_grad=True)
    ours, theirs = Halving()(x), nn.AvgPool2d(2)(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)
    g = torch.randn(ours.shape, generator=chance, dtype=torch.float64)
    expected = torch.autograd.grad(theirs, x, g)[0]
    torch.testing.assert_close(torch.autograd.grad(ours, x, g)[0], expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(Halving().transposed(g, x.detach()), expected, rtol=1e-14, atol=1e-15)


def test_every_block_of_a_convnet_has_it():
    net = ConvNet(3, 10, 4, 3, 32)
    assert sum(isinstance(part, Halving) for part in net.modules()) == 3
    seen = []
    for part in net.modules():
        if isinstance(part, Halving):
            part.register_forward_hook(lambda _, x, y: seen.append((x[0].shape[2:], y.shape[2:])))
    net(torch.zeros(1, 3, 32, 32))
    assert seen == [((32, 32), (16, 16)), ((16, 16), (8, 8)), ((8, 8), (4, 4))]
