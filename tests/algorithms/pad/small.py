"""A distillation small enough to be done hundreds of times: two layers, three experts of five epochs, eight images.

As a script: small.py FOLDER distils undisturbed and killed at random moments, then in one process and in two. States
are left in FOLDER; it says how many kills there were.
"""

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from algorithms.forks import ended, forked, until_done
from ghostgram.algorithms.pad.distill import Course, distill
from ghostgram.algorithms.pad.gradient import mask
from ghostgram.algorithms.pad.matching import Matching
from ghostgram.algorithms.pad.settings import Settings
from ghostgram.algorithms.pad.students.convnet import initialised
from ghostgram.algorithms.pad.students.flat import Flat

CLASSES, SIDE, EPOCHS = 4, 3, 5
SETTINGS = Settings(
    ipc=2, beta=0.05, steps=3, target_epochs=1, start_bound=2, start_end=4, expand_iters=10, batch=3, alpha=0.25,
    iterations=15, lr_images=0.1, lr_labels=0.1, lr_beta=1e-4, checkpoint_every=4, experts=3, expert_epochs=EPOCHS,
    threshold=5.0, eval_every=6, seed=7,
)  # fmt: skip


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 6), nn.GELU(), nn.Linear(6, CLASSES))


def blobs(n=200, seed=0):
    """Images of classes around centres of their own, and their classes."""
    chance = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % CLASSES
    return centres[labels] + 0.7 * torch.randn(n, 1, SIDE, SIDE, generator=chance), labels


class Kept(dict):
    """Trajectories in memory, read as a store is."""

    experts, epochs = SETTINGS.experts, tuple(range(EPOCHS + 1))


def trajectories():
    """The layout, and experts trained by plain SGD."""
    images, labels = blobs()
    kept = Kept()
    for expert in range(SETTINGS.experts):
        model = initialised(net, 0, "expert", (expert,))
        flat = Flat(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        kept[expert, 0] = flat.vector(model).numpy()
        for epoch in range(EPOCHS):
            for x, y in zip(images.split(40), labels.split(40), strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            kept[expert, epoch + 1] = flat.vector(model).numpy()
    return flat, kept


def start():
    """Images and label logits to start from."""
    images, labels = blobs(SETTINGS.ipc * CLASSES, 1)
    return images, 2.0 * nn.functional.one_hot(labels, CLASSES).float()


def validate(state):
    """Stands in for nets: it depends on every pixel."""
    return [float(torch.sigmoid(state.images.sum() + i)) for i in range(3)]


def run(folder, nap=0.0, allow_changes=(), validate=validate, **changes):
    """Distils in a folder, as far as the settings say."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, (flat, kept), (images, labels) = replace(SETTINGS, **changes), trajectories(), start()
    matching = Matching(settings, flat, kept, mask.depth(settings.alpha), None)
    if settings.labels == "hard":
        labels = labels.argmax(1)
    course = Course(folder, settings.as_json(), allow_changes, validate, lambda state: time.sleep(nap))
    return distill(matching, images, labels, course)


STORM = 60  # iterations


def storm(folder):
    """Kills at moments that are not the program's."""
    kills = until_done(lambda: run(folder / "killed", nap=0.003, iterations=STORM), 5, (0.05, 0.3), 1)
    run(folder / "through", iterations=STORM)
    print(kills)


def ranks(folder):
    """Both processes call `run` alike."""

    def both(rank):
        torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
        torch.save(vars(run(folder / "both", matches=3)), folder / f"{rank}.pt")

    children = [forked(partial(both, rank)) for rank in range(2)]
    torch.save(vars(run(folder / "alone", matches=3)), folder / "alone.pt")
    assert [ended(child) for child in children] == [0, 0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    storm(Path(sys.argv[1]))
    ranks(Path(sys.argv[1]))
