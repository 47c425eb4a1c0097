"""PAD's matching gradient: what the exact one costs beside the full graph, and how far TESLA's is from both.

    PYTHONPATH=benchmarks python benchmarks/algorithms/bench_pad_match.py                # all parts: minutes
    PYTHONPATH=benchmarks python benchmarks/algorithms/bench_pad_match.py cost memory passes tesla      # or some

Times are CPU seconds of one thread; all ways take turns, and the median over rounds is shown. Memory is the most that
was resident during a call beyond what was before it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from peers import memory
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ghostgram.algorithms.pad.gradient import mask
from ghostgram.algorithms.pad.gradient.inner import Inner, Problem
from ghostgram.algorithms.pad.gradient.match import match
from ghostgram.algorithms.pad.gradient.second import form_of
from ghostgram.algorithms.pad.students.convnet import ConvNet, initialised
from ghostgram.algorithms.pad.students.flat import Flat
from ghostgram.testing.turns import alternated

STEPS, ROUNDS = (5, 20, 80), 3
COUNTED = 10  # steps whose products are counted
STUDENTS = {  # channels, classes, width, depth, size, batch
    "digits, D2-32, 8x8, batch 100": (1, 10, 32, 2, 8, 100),
    "fashion, D3-32, 28x28, batch 10": (1, 10, 32, 3, 28, 10),
    "CIFAR, D3-128, 32x32, batch 2": (3, 10, 128, 3, 32, 2),
}
WAYS = {
    "full graph": {"gradient": "full"},
    "exact": {},
    "exact, double backward": {"second": "double_backward"},
    "exact, store sqrt": {"store": "sqrt"},
    "tesla": {"gradient": "tesla"},
}


def turned(step: int, images: Tensor, indices: Tensor) -> Tensor:
    """A rotation that differs by step and image, resampled."""
    angles = torch.sin(indices + 3.0 * step).to(images.dtype) / 4
    zero = torch.zeros_like(angles)
    rows = [torch.stack([angles.cos(), -angles.sin(), zero], 1), torch.stack([angles.sin(), angles.cos(), zero], 1)]
    grid = nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=True)
    return nn.functional.grid_sample(images, grid, align_corners=True)


def case(
    make: Callable[[], nn.Module], shape: tuple[int, ...], classes: int, steps: int, dtype: torch.dtype = torch.float32
) -> tuple[Problem, Tensor, Tensor]:
    """Full batches of random images, from initial weights to others a tenth of the way to a second student."""
    student, other = (initialised(make, 0, "student", (i,)).to(dtype) for i in range(2))
    flat, chance = Flat(student), torch.Generator().manual_seed(0)
    start = flat.vector(student)
    whole = torch.arange(shape[0])
    problem = Problem(
        flat, start, start + 0.1 * flat.vector(other), mask.depth(0.25), steps, lambda step: whole, turned
    )
    images = torch.randn(*shape, generator=chance, dtype=dtype)
    return problem, images, 2 * torch.randn(shape[0], classes, generator=chance, dtype=dtype)


def seconds(call: Callable[[], object]) -> float:
    """CPU time."""
    started = time.process_time()
    call()
    return time.process_time() - started


def peak(call: Callable[[], object]) -> float:
    """MiB resident at the peak, beyond what was before."""
    with memory.pages_of_their_own():
        before = memory.start()
        call()
        return memory.peak_since(before) or 0.0


def cost(console: Console) -> None:
    """CPU seconds of every way."""
    for title, (channels, classes, width, depth, size, batch) in STUDENTS.items():
        table = Table("N", "way", "s", "of full", "s per step", title=title)
        make = partial(ConvNet, channels, classes, width, depth, size)
        for steps in STEPS:
            problem, images, labels = case(make, (batch, channels, size, size), classes, steps)
            calls = {name: partial(match, problem, images, labels, 0.01, **way) for name, way in WAYS.items()}
            turns = [{name: seconds(call) for name, call in calls.items()} for _ in range(ROUNDS)]
            for name in WAYS:
                median, full = (statistics.median(turn[way] for turn in turns) for way in (name, "full graph"))
                table.add_row(str(steps), name, f"{median:.3f}", f"{median / full:.2f}", f"{median / steps:.4f}")
            table.add_section()
        console.print(table)


def resident(console: Console) -> None:
    """Peak memory of every way; "exact" beside its kept weights as well."""
    for title, (channels, classes, width, depth, size, batch) in STUDENTS.items():
        table = Table("N", *WAYS, "exact, beside weights", title=f"MiB of {title}")
        make = partial(ConvNet, channels, classes, width, depth, size)
        for steps in STEPS:
            problem, images, labels = case(make, (batch, channels, size, size), classes, steps)
            peaks = {name: peak(partial(match, problem, images, labels, 0.01, **way)) for name, way in WAYS.items()}
            beside = peaks["exact"] - (steps + 1) * problem.flat.P * 4 / 2**20
            table.add_row(str(steps), *(f"{mib:.1f}" for mib in peaks.values()), f"{beside:.1f}")
        console.print(table)


def passes(console: Console) -> None:
    """What a step's parts cost: the gradient on the way forward, and each form of the second-order pass."""
    names = ("gradient", "layers", "double_backward", "jvp")
    times = Table("student", *names, title="CPU seconds of one step")
    products = Table("student", *names, "full graph", title="FLOPs of products per step, in forward passes")
    for title, (channels, classes, width, depth, size, batch) in STUDENTS.items():
        make = partial(ConvNet, channels, classes, width, depth, size)
        problem, images, labels = case(make, (batch, channels, size, size), classes, COUNTED)
        inner = Inner(problem, images, labels, torch.full((COUNTED,), 0.01), None)
        (piece,), direction = inner.pieces(0), problem.target - problem.start
        calls = {"gradient": partial(inner.gradient, problem.start, 0)} | {
            name: partial(form_of(name, problem.flat), inner, 0, piece, problem.start, direction) for name in names[1:]
        }
        medians = alternated(seconds, calls, rounds=8)
        times.add_row(title, *(f"{medians[name]:.4f}" for name in names))
        forward = flops(partial(problem.flat.logits, problem.start, images))
        full = flops(partial(match, problem, images, labels, 0.01, "full")) / COUNTED
        products.add_row(title, *(f"{count / forward:.2f}" for count in (*map(flops, calls.values()), full)))
    console.print(times, products)


def flops(call: Callable[[], object]) -> int:
    """Of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def tesla(console: Console) -> None:
    """How near TESLA's gradient is to the exact one, in float64."""
    table = Table("student", "N", "beta", "cosine", "relative error", "its dL/dbeta / exact", title="TESLA's gradient")
    softmax = ("softmax regression", lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), (50, 3, 8, 8), 10)
    convnet = ("ConvNet D2-16, 16x16", lambda: ConvNet(3, 4, 16, 2, 16), (12, 3, 16, 16), 4)
    settings = [(softmax, 80, beta) for beta in (0.01, 0.05, 0.1, 0.2)]
    settings += [(convnet, steps, beta) for beta in (0.01, 0.02) for steps in STEPS]
    for (title, make, shape, classes), steps, beta in settings:
        problem, images, labels = case(make, shape, classes, steps, torch.float64)
        exact, other = (match(problem, images, labels, beta, gradient) for gradient in ("exact", "tesla"))
        cosine = torch.cosine_similarity(exact.images.flatten(), other.images.flatten(), 0)
        error = (exact.images - other.images).norm() / exact.images.norm()
        table.add_row(
            title, str(steps), f"{beta}", f"{cosine:.3f}", f"{error:.2f}", f"{float(other.beta / exact.beta):.2f}"
        )
    console.print(table)


PARTS = {"cost": cost, "memory": resident, "passes": passes, "tesla": tesla}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them by default")
    torch.set_num_threads(1)
    for part in parser.parse_args().parts or PARTS:
        PARTS[part](Console(width=120))
