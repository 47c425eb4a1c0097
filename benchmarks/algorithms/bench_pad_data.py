"""PAD's data side: an augmentation with its adjoint beside torch's autograd, and GraNd beside gradients stored."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from interleave import interleaved
from torch import Tensor
from torch.func import functional_call, grad, vmap

from ghostgram.algorithms.pad.augment import Drawn, Dsa
from ghostgram.algorithms.pad.convnet import ConvNet
from ghostgram.algorithms.pad.hardness import MEASURES

BATCHES = {"digits": (100, 1, 8), "fashion": (100, 1, 28), "cifar": (100, 3, 32)}
"""Images, channels, side."""
STUDENTS = {"digits": (1, 8, 32, 2), "fashion": (1, 28, 32, 3), "cifar": (3, 32, 128, 3)}
"""Channels, side, width, depth."""


def looked_up(drawn: Drawn, x: Tensor) -> Tensor:
    """Scale and rotate by torch's grids."""
    theta, p = x.new_zeros(len(x), 2, 3), drawn.parameters.to(x)
    if drawn.op == "scale":
        theta[:, 0, 0], theta[:, 1, 1] = p.T
    else:
        cos, sin = p[:, 0].cos(), p[:, 0].sin()
        theta[:, 0, 0], theta[:, 0, 1], theta[:, 1, 0], theta[:, 1, 1] = cos, -sin, sin, cos
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=True), align_corners=True)


@pytest.mark.parametrize("op", ["scale", "rotate"])
@pytest.mark.parametrize("name", BATCHES)
def bench_resampling(benchmark, record, name, op):
    n, channels, size = BATCHES[name]
    dsa, counters, ids = Dsa(0, size, (op,)), (3, 4), torch.arange(n)
    x, g = torch.randn(n, channels, size, size), torch.randn(n, channels, size, size)
    leaf = x.clone().requires_grad_()

    def ours() -> tuple[Tensor, Tensor]:
        drawn = dsa.draw(counters, ids)
        return dsa.apply(drawn, x), dsa.adjoint(drawn, g)

    def by_autograd() -> tuple[Tensor, Tensor]:
        y = looked_up(dsa.draw(counters, ids), leaf)
        return y.detach(), torch.autograd.grad(y, leaf, g)[0]

    for found, expected in zip(ours(), by_autograd(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    seconds = interleaved(benchmark, ours, {"torch": by_autograd}, rounds=15, cold=False)
    record(batch=name, op=op, **{f"{way}_ms": 1e3 * took for way, took in seconds.items()})


@pytest.mark.parametrize("op", ["color", "crop", "cutout", "flip"])
def bench_augmentation(benchmark, record, op):
    n, channels, size = BATCHES["cifar"]
    dsa, counters, ids = Dsa(0, size, (op,)), (3, 4), torch.arange(n)
    x, g = torch.randn(n, channels, size, size), torch.randn(n, channels, size, size)
    drawn = dsa.draw(counters, ids)
    parts = {"apply": lambda: dsa.apply(drawn, x), "adjoint": lambda: dsa.adjoint(drawn, g)}
    seconds = interleaved(benchmark, lambda: dsa.draw(counters, ids), parts, rounds=15, cold=False)
    seconds["draw"] = seconds.pop("ours")
    record(batch="cifar", op=op, **{f"{part}_ms": 1e3 * took for part, took in seconds.items()})


@pytest.mark.parametrize("name", STUDENTS)
def bench_grand(benchmark, record, name):
    channels, size, width, depth = STUDENTS[name]
    torch.manual_seed(0)
    model = ConvNet(channels, 10, width, depth, size).eval()
    x, y = torch.randn(32, channels, size, size), torch.arange(32) % 10
    weights = {name: p.detach() for name, p in model.named_parameters()}
    measures = {kind: MEASURES[kind](model) for kind in ("grand", "grand_last", "el2n")}

    def plain() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y, reduction="sum").backward()

    def stored() -> Tensor:
        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(model, weights, x[None]), y[None])

        each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
        return torch.cat([g.flatten(1) for g in each.values()], 1).norm(dim=1)

    torch.testing.assert_close(measures["grand"](x, y).float(), stored(), rtol=1e-3, atol=1e-3)
    rivals = {
        "plain": plain,
        "stored": stored,
        "grand_last": lambda: measures["grand_last"](x, y),
        "el2n": lambda: measures["el2n"](x, y),
    }
    seconds = interleaved(benchmark, lambda: measures["grand"](x, y), rivals, rounds=7, cold=False)
    over_plain = {f"{way}_over_plain": took / seconds["plain"] for way, took in seconds.items() if way != "plain"}
    record(student=name, plain_ms=1e3 * seconds["plain"], **over_plain)
