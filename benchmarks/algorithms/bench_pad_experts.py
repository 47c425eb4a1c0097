"""What experts and evaluations of PAD cost, in seconds of one core, at the sizes of the digits and fashion presets.

    python benchmarks/algorithms/bench_pad_experts.py                     # all parts: three minutes on a quiet machine
    python benchmarks/algorithms/bench_pad_experts.py parts ways pooling evaluation store         # or some of them

Images are noise, for time does not depend on what they show. Of ways that are compared each is timed in turn, several
times over, and the fastest counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ghostgram.algorithms.pad import convnet, gradients
from ghostgram.algorithms.pad.augment import Dsa
from ghostgram.algorithms.pad.convnet import ConvNet
from ghostgram.algorithms.pad.evaluate import evaluate
from ghostgram.algorithms.pad.experts import record
from ghostgram.algorithms.pad.flat import Flat

PRESETS = {"digits": (8, 2, 1437, 12), "fashion": (28, 3, 5000, 15)}
"""Size of the images, depth of the network, images of an epoch, epochs."""

EXPERTS, BATCH, CLASSES, WIDTH, TURNS = 5, 256, 10, 32, 5


def network(preset: str) -> Callable[[], nn.Module]:
    size, depth, *_ = PRESETS[preset]
    return partial(ConvNet, 1, CLASSES, WIDTH, depth, size)


def noise(preset: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = PRESETS[preset][0]
    return torch.rand(n, 1, size, size), torch.randint(0, CLASSES, (n,))


def fastest(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of a core, whatever else the machine does."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(TURNS):
        for name, way in ways.items():
            started = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - started)
    return best


def step(preset: str, models: int, batch: int) -> Callable[[], object]:
    """Gradients of some models, each on a batch of its own."""
    flat = Flat(network(preset)())
    weights = flat.vector(flat.module).repeat(models, 1)
    images, labels = noise(preset, models * batch)
    x, y = images.view(models, batch, *images.shape[1:]), labels.view(models, batch)
    return partial(gradients.gradients, flat, weights, x, y)


def parts(console: Console) -> None:
    table = Table(title=f"One gradient of {BATCH} images, so many in a forward: microseconds an image")
    counts = (8, 16, 32, 64, 128, 256)
    for name in ("preset", *map(str, counts)):
        table.add_column(name, justify="right")
    for preset, (size, *_) in PRESETS.items():
        whole = step(preset, 1, BATCH)

        def way(count: int, whole: Callable[[], object] = whole, size: int = size) -> object:
            gradients.PIXELS = count * size * size
            return whole()

        before = gradients.PIXELS
        found = fastest({str(count): partial(way, count) for count in counts})
        gradients.PIXELS = before
        table.add_row(preset, *(f"{seconds / BATCH * 1e6:.0f}" for seconds in found.values()))
    console.print(table)


def ways(console: Console) -> None:
    table = Table(title=f"Gradients of {EXPERTS} models, one after the other and by vmap: milliseconds a model")
    for name in ("preset", "batch", "in turn", "vmap"):
        table.add_column(name, justify="right")
    for preset in PRESETS:
        for batch in (10, 100, BATCH):
            found = fastest({"in turn": step(preset, 1, batch), "vmap": step(preset, EXPERTS, batch)})
            table.add_row(preset, f"{batch}", f"{found['in turn'] * 1e3:.1f}", f"{found['vmap'] / EXPERTS * 1e3:.1f}")
    console.print(table)


def pooling(console: Console) -> None:
    table = Table(title=f"One gradient of {BATCH} images, by how the network pools: microseconds an image")
    for name in ("preset", "AvgPool2d(2)", "a product"):
        table.add_column(name, justify="right")
    ours = convnet.Halving
    for preset in PRESETS:
        convnet.Halving = partial(nn.AvgPool2d, 2)
        theirs = step(preset, 1, BATCH)
        convnet.Halving = ours
        found = fastest({"theirs": theirs, "ours": step(preset, 1, BATCH)})
        table.add_row(preset, *(f"{seconds / BATCH * 1e6:.0f}" for seconds in found.values()))
    console.print(table)


def evaluation(console: Console) -> None:
    table = Table(
        title="Fresh networks on 1 and 10 images a class, with DSA: milliseconds a pass, seconds for 5 x 1,001"
    )
    for name in ("preset", "images", "pass, ms", "in all, s"):
        table.add_column(name, justify="right")
    passes = 5
    for preset, (size, *_) in PRESETS.items():
        for ipc in (1, 10):
            images, labels = noise(preset, CLASSES * ipc)
            run = partial(evaluate, network(preset), images, labels, 0.01, images, labels, nets=1, augment=Dsa(0, size))
            found = fastest({"many": partial(run, epochs=1 + passes), "one": partial(run, epochs=1)})
            seconds = (found["many"] - found["one"]) / passes
            table.add_row(preset, f"{CLASSES * ipc}", f"{seconds * 1e3:.1f}", f"{seconds * 1001 * 5:.0f}")
    console.print(table)


def store(console: Console) -> None:
    table = Table(
        title="Experts of the recipe pad without its schedule (all images in every epoch), checkpoints and all"
    )
    for name in ("preset", "images", "epoch of an expert, s", f"{EXPERTS} experts, s"):
        table.add_column(name, justify="right")
    for preset, (size, _, n, epochs) in PRESETS.items():
        images, labels = noise(preset, min(n, 2 * BATCH * 3))

        one = partial(record, network(preset), images, labels, recipe="datm", experts=1, augment=Dsa(0, size))

        def run(epochs: int, one: Callable[..., object] = one) -> None:
            with tempfile.TemporaryDirectory() as folder:
                one(folder=Path(folder), epochs=epochs, progress=False)

        found = fastest({"two": partial(run, 2), "one": partial(run, 1)})
        seconds = (found["two"] - found["one"]) / len(images) * n
        table.add_row(preset, f"{n}", f"{seconds:.2f}", f"{seconds * epochs * EXPERTS:.0f}")
    console.print(table)


PARTS = {"parts": parts, "ways": ways, "pooling": pooling, "evaluation": evaluation, "store": store}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them by default")
    torch.set_num_threads(1)
    console = Console(width=120)
    for part in parser.parse_args().parts or PARTS:
        PARTS[part](console)


if __name__ == "__main__":
    main()
