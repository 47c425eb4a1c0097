"""trajectory_match beside the torch expression it replaces: loss and gradient, and how near they come to the roof."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interleave import interleaved

import ghostgram as gg
from ghostgram import _dispatch
from ghostgram.testing import layouts, plain, roofline
from ghostgram.testing.cases import trajectory_match as cases
from ghostgram.testing.compare import error_over_bound

LISTS = {"ConvNet-D3": cases.CONVNET_D3, "50 M": (1_000_000,) * 50}
MASKS = ("none", "weights", "real")


def expression(student: list[Any], start: list[Any], target: list[Any], m: list[Any]) -> Any:
    """((s - t) * m).pow(2).sum() over ((s0 - t) * m).pow(2).sum(), over the list; m is the root of the weights."""
    num = sum(((s - t) * w).pow(2).sum() for s, t, w in zip(student, target, m, strict=True))
    return num / sum(((s - t) * w).pow(2).sum() for s, t, w in zip(start, target, m, strict=True))


def made(sizes: tuple[int, ...], mask: str) -> tuple[Any, ...]:
    """Leaves, start, target; the mask as ours takes it and, its root, as the expression does."""
    torch.manual_seed(0)
    student, start, target = ([torch.randn(n) for n in sizes] for _ in range(3))
    weights = [torch.rand(n) if mask == "real" else torch.tensor(1.0 + t % 2) for t, n in enumerate(sizes)]
    ours = None if mask == "none" else weights if mask == "real" else [float(w) for w in weights]
    return [x.requires_grad_() for x in student], start, target, ours, [w.sqrt() for w in weights]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", LISTS)
def bench_against_the_expression(benchmark, record, sizes, mask):
    small = cases.Case((1000, 37), mask=mask)
    worst = error_over_bound("trajectory_match", small, "float32", "cpu", layouts.torch_array)
    assert max(worst.values()) <= 1, worst
    leaves, start, target, weights, roots = made(LISTS[sizes], mask)
    rival = (lambda *lists: plain.matching_loss(*lists[:3])) if mask == "none" else expression

    def both(loss: Any) -> Any:
        return torch.autograd.grad(loss, leaves)

    detached = [x.detach() for x in leaves]
    seconds = interleaved(
        benchmark,
        lambda: both(gg.trajectory_match(leaves, start, target, weights)),
        {
            "torch": lambda: both(rival(leaves, start, target, roots)),
            "loss": lambda: gg.trajectory_match(detached, start, target, weights),
            "torch_loss": lambda: rival(detached, start, target, roots),
            "at_once": lambda: gg.trajectory_match_grad(detached, start, target, weights),
        },
        rounds=100 if sizes == "ConvNet-D3" else 8,
        cold=False,
    )
    record(
        list=sizes,
        mask=mask,
        us=1e6 * seconds["ours"],
        torch_us=1e6 * seconds["torch"],
        speedup=seconds["torch"] / seconds["ours"],
        at_once_us=1e6 * seconds["at_once"],
        at_once_speedup=seconds["torch"] / seconds["at_once"],
        loss_us=1e6 * seconds["loss"],
        loss_speedup=seconds["torch_loss"] / seconds["loss"],
    )


@pytest.mark.parametrize("mask", ["none", "real"])
@pytest.mark.parametrize("sizes", LISTS)
def bench_kernel_against_memory(record, sizes, mask):
    """The room itself into memory that exists already, beside the roofs of as much torch memory at the same moment."""
    size = sum(LISTS[sizes])
    for wanted in ("loss", "gradient", "both"):
        case = cases.Case(LISTS[sizes], wanted, mask)
        call = kernel(case)
        held = roofline.measure(0.2, memory=torch.ones(4 * size))
        seconds = median(call, 200 if size < 4 << 20 else 8)
        gbytes = case.bytes("float32") / seconds / 1e9
        # "both" is a sweep that reads and one that reads and writes: the time that each roof allows its own.
        per_scalar, masked = case.bytes("float32") / size, 4 if mask == "real" else 0
        reads = {"loss": per_scalar, "gradient": 0, "both": 8 + masked}[wanted] * size
        least = reads / held.read + (case.bytes("float32") - reads) / max(held.triad, held.copy)
        record(
            list=sizes,
            mask=mask,
            kernel=wanted,
            us=1e6 * seconds,
            gbytes=gbytes,
            percent_of_bandwidth=100 * least / seconds,
            read_gbytes=held.read / 1e9,
            copy_gbytes=held.copy / 1e9,
            triad_gbytes=held.triad / 1e9,
        )


def kernel(case: cases.Case) -> Callable[[], None]:
    """The room on torch tensors of a case, outputs allocated once."""
    student, start, target, weights, _ = made(case.sizes, case.mask)
    student = [x.detach() for x in student]
    loss, totals = torch.zeros(()), torch.tensor([1.0, 2.0, 3.0, 0.0]).double()
    gradient = None if case.wanted == "loss" else [torch.zeros_like(x) for x in student]
    alone = case.wanted == "gradient"
    args = (
        *(student, None if alone else start, target, weights),
        *(torch.tensor(1.0) if alone else None, None if alone else loss, totals, gradient, None, 0),
    )
    return lambda: _dispatch.run("trajectory_match", "cpu", *args)


def median(call: Callable[[], None], rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])
