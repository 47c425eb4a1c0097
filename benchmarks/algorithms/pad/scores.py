"""How much of a difficulty score is luck: two sets of models score the same images, and are compared.

    python benchmarks/algorithms/pad/scores.py              # digits, some minutes on one core
    python benchmarks/algorithms/pad/scores.py --set fashion-mnist --images 5000 --width 32 --depth 3

Of each kind, epoch and number of models in a set: the rank correlation of the two sets' scores within classes, and the
share of the easiest three quarters of each class that both sets agree on. By chance that is three quarters.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ghostgram.algorithms.pad.convnet import ConvNet
from ghostgram.algorithms.pad.schedule import DifficultySchedule
from ghostgram.algorithms.pad.scorer import Scorer, Training
from ghostgram.algorithms.pad.scores import Scores
from ghostgram.data import load_images


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--set", default="digits")
    options.add_argument("--images", type=int, help="so many of the training images, the first ones")
    options.add_argument("--width", type=int, default=32)
    options.add_argument("--depth", type=int, default=2)
    options.add_argument(
        "--runs", type=int, nargs="+", default=[1, 2, 5, 10], help="models in a set, each a divisor of the largest"
    )
    options.add_argument("--epochs", type=int, nargs="+", default=[5, 20])
    options.add_argument("--kinds", nargs="+", default=["el2n"])
    given = options.parse_args()

    found = load_images(given.set)
    images, labels = torch.from_numpy(found.train_images), torch.from_numpy(found.train_labels)
    images, labels = images[: given.images], labels[: given.images]
    images = images / 255 if images.dtype == torch.uint8 else images
    make = partial(ConvNet, images.shape[1], len(found.classes), given.width, given.depth, images.shape[2])
    table = Table("kind", "epoch", "models in a set", "rank correlation", "easiest 3/4 in common")
    for kind in given.kinds:
        for epoch in given.epochs:
            scorer = Scorer(make, images, labels, kind, epoch, 0, Training(), 128)
            values = np.stack([scorer.values(run) for run in range(2 * max(given.runs))])
            for runs in given.runs:
                sets = [Scores(part.mean(0), labels.numpy(), {}) for part in np.split(values, len(values) // runs)]
                each = [compared(*pair) for pair in zip(sets[::2], sets[1::2], strict=True)]
                table.add_row(kind, str(epoch), str(runs), *(f"{mean:.3f}" for mean in np.mean(each, axis=0)))
    Console().print(table)


def compared(one: Scores, other: Scores) -> tuple[float, float]:
    """Mean rank correlation within classes, and the share of the easiest three quarters in common."""
    places = [[np.argsort(scores.order(c)) for scores in (one, other)] for c in range(one.classes)]
    easiest = [set(DifficultySchedule(scores, 0.75, 1).indices(0).tolist()) for scores in (one, other)]
    correlation = np.mean([np.corrcoef(*pair)[0, 1] for pair in places])
    return float(correlation), len(easiest[0] & easiest[1]) / len(easiest[0])


if __name__ == "__main__":
    main()
