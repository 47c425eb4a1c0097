"""Expert trajectories: networks trained on the real data, whose weights are kept after chosen epochs."""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ghostgram.algorithms.pad.augment import Dsa
from ghostgram.algorithms.pad.convnet import initialised
from ghostgram.algorithms.pad.flat import Flat
from ghostgram.algorithms.pad.gradients import TOGETHER, check_labelled
from ghostgram.algorithms.pad.gsam import check_gsam
from ghostgram.algorithms.pad.identity import digest_of
from ghostgram.algorithms.pad.recorder import Recorder
from ghostgram.algorithms.pad.schedule import DifficultySchedule
from ghostgram.algorithms.pad.several import sent, spread, threads_of
from ghostgram.algorithms.pad.store import DTYPES, LOG, SCHEMA, Store
from ghostgram.algorithms.pad.trainer import Trainer


@dataclass(frozen=True)
class Recipe:
    """How experts are trained: SGD at a constant rate, no momentum, no weight decay, wrapped in adaptive GSAM."""

    lr: float = 0.01
    rho: float = 0.01
    """The radius of `gsam_step`; at 0 the step is plain SGD."""
    alpha: float = 0.3
    epochs: int = 100
    batch: int = 256
    scheduled: bool = False
    """Whether images come and go by difficulty."""


RECIPES = {
    "pad": Recipe(scheduled=True),
    "datm": Recipe(),
    "ftd": Recipe(epochs=50),
    "mtt": Recipe(rho=0.0, alpha=0.0, epochs=50),
}
"""The published ones."""


def record(
    make_model: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    folder: str | Path,
    recipe: str | Recipe = "pad",
    *,
    experts: int = 100,
    epochs: int | None = None,
    batch: int | None = None,
    schedule: DifficultySchedule | None = None,
    augment: Dsa | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    keep: Iterable[int] | None = None,
    group: int | None = None,
    dtype: str = "float32",
    facts: Mapping[str, Any] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Store:
    """Trains experts and keeps their weights in a folder; called again with the same arguments, goes on.

    Every step is `gsam_step` on one augmented batch. In epoch e (from 0) an expert sees `schedule.indices(e)` once
    each, in an order of its own; the last batch may be smaller. Initial weights, orders, augmentations and whatever the
    model itself draws are functions of `seed`, the expert and the epoch, and global generators are left alone. So an
    expert can be killed at any moment: it goes on from its last whole epoch, to the same bits, on the same device with
    as many threads and the same versions of torch. Where these differ from those the store was begun with, that is
    warned of.

    Any number of processes may record into a folder at the same time, on this machine or, where the file system has
    locks, on others: each takes groups that no other has.

    Args:
        make_model: Makes a network on the CPU, its weights drawn by torch; float32.
        images: (n, C, H, W) float32, whitened if experts are to see them so. Their device is the one trained on.
        labels: (n,) int64 classes.
        folder: Where the store is, or is to be.
        recipe: "pad", "datm", "ftd" or "mtt", or a `Recipe`. "pad" wants a schedule, the others refuse one.
        experts: How many.
        epochs: Of each; the recipe's by default.
        batch: Images of a step; the recipe's by default.
        schedule: Which images which epoch sees.
        augment: Augmentation of every batch; drawn from its stream's name with " expert" added.
        validation: (images, labels) that accuracy is measured on after each epoch. Without it the accuracy is that on
            the epoch's own augmented batches.
        seed: Any integer.
        keep: Epochs whose weights are kept, 0 to `epochs`; the last one always is. By default all.
        group: Experts trained at once, one `vmap` for all; by default 1 on a CPU and 10 on a GPU. It changes results
            by rounding only, and is part of the store's header, as going on exactly needs the same one.
        dtype: "float32" or "float16" of the kept weights; the log holds the rounding error of each row.
        facts: What else the header is to say, for readers to insist on, such as {"zca": digest}.
        workers: Processes that share the groups, each with an equal share of this one's threads; on a CPU only. They
            are spawned: a script that gets here has to be guarded by `if __name__ == "__main__"`.
        progress: Whether a bar on the terminal counts epochs.

    Returns:
        The finished store, open for reading.

    Raises:
        TypeError: images, labels or the model have another dtype, or make_model cannot be pickled for workers.
        ValueError: An argument is out of its range, or shapes do not fit.
        StoreError: The folder holds a store of something else, or a damaged one.
        DivergedError: The weights of an expert are not finite; what was recorded before stays.
        RuntimeError: A worker died; record again to go on.

    Cost:
        An epoch of an expert: two forwards and backwards of every image, one where rho is 0, and on the disk 4 P bytes
        of checkpoint and, if it is kept, as many of weights.

    Source:
        PAD (arXiv 2408.03360), and before it MTT (2203.11932), FTD (2211.11004) and DATM (2310.05773).
    """
    name, how = (recipe, _named(recipe)) if isinstance(recipe, str) else ("own", recipe)
    how = replace(how, epochs=how.epochs if epochs is None else epochs, batch=how.batch if batch is None else batch)
    kept = sorted({*(range(how.epochs + 1) if keep is None else map(int, keep)), how.epochs})
    together = (1 if images.device.type == "cpu" else min(TOGETHER, experts)) if group is None else group
    _check(how, experts, kept, together, schedule is not None, dtype)
    flat = Flat(initialised(make_model, seed, "expert", (0,)).to(images.device))
    check_labelled(flat, images, labels)
    if validation is not None:
        check_labelled(flat, *validation, "validation ")
    if workers < 1 or (workers > 1 and images.device.type != "cpu"):
        raise ValueError(
            f"workers: expected 1, or more on a CPU, got {workers} on {images.device}: on a GPU raise group, and for "
            "several GPUs call record() from one process for each, with the same folder"
        )
    if workers > 1:
        sent(make_model)  # refused here, before anything is written
    indices = schedule.indices if schedule else partial(_always, np.arange(len(images)))
    header = {
        "schema": SCHEMA, "recipe": name, **asdict(how), "experts": experts, "kept": kept, "dtype": dtype, "seed": seed,
        "group": together, "parameters": flat.P, "names": flat.names, "shapes": flat.shapes, "offsets": flat.offsets,
        "model": repr(flat.module), "augment": repr(augment), "dataset": digest_of(images, labels),
        "validation": None if validation is None else digest_of(*validation),
        "accuracy": "training batches" if validation is None else "validation",
        **_scheduled(indices, how.epochs, len(images)), "facts": dict(facts or {}),
        "version": version("ghostgram"), "torch": torch.__version__, "device": images.device.type,
        "threads": threads_of(workers),
    }  # fmt: skip
    drawn = None if augment is None else replace(augment, stream=f"{augment.stream} expert")
    recorder = Recorder(Path(folder), header)
    trainer = Trainer(
        recorder, make_model, images, labels, indices, drawn, validation, seed, how.lr, how.rho, how.alpha, how.epochs,
        how.batch,
    )  # fmt: skip
    groups = [range(first, min(first + together, experts)) for first in range(0, experts, together)]
    with _bar(recorder, experts * (how.epochs + 1), progress):
        ours = spread(partial(trainer.train, wait=False), groups, workers)
        of_others = [group for group, had in zip(groups, ours, strict=True) if not had]
        spread(partial(trainer.train, wait=True), of_others, workers)
    return Store.open(folder)


def _named(recipe: str) -> Recipe:
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)} or a Recipe, got {recipe!r}")
    return RECIPES[recipe]


def _check(how: Recipe, experts: int, kept: list[int], group: int, has_schedule: bool, dtype: str) -> None:
    check_gsam(how.rho, how.alpha)
    for name, value in (("experts", experts), ("epochs", how.epochs), ("batch", how.batch), ("group", group)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if kept[0] < 0 or kept[-1] > how.epochs:
        raise ValueError(f"keep: expected epochs from 0 to {how.epochs}, got {kept[0]} to {kept[-1]}")
    if has_schedule != how.scheduled:
        wanted = "a DifficultySchedule" if how.scheduled else "None"
        raise ValueError(f"schedule: this recipe's scheduled is {how.scheduled}: expected {wanted}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(DTYPES)}, got {dtype!r}")


def _always(every: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
    return every


def _scheduled(indices: Callable[[int], NDArray[np.int64]], epochs: int, n: int) -> dict[str, Any]:
    """What a header says of the schedule: how many images each epoch sees, and the digest of which."""
    running, counts = hashlib.blake2b(digest_size=16), []
    for epoch in range(epochs):
        seen = np.asarray(indices(epoch), np.int64)
        if seen.max() >= n:
            raise ValueError(f"schedule: epoch {epoch} has image {seen.max()}, of {n} that there are")
        counts.append(len(seen))
        running.update(np.int64(len(seen)).tobytes() + seen.tobytes())
    return {"schedule": running.hexdigest(), "images": counts}


@contextmanager
def _bar(recorder: Recorder, total: int, wanted: bool) -> Iterator[None]:
    """A bar on the terminal, where there is one, of the lines in the log: whoever writes them."""
    if not wanted or importlib.util.find_spec("rich") is None:
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, over = Console(stderr=True), threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("experts: epochs", total=total)

        def watch() -> None:
            while not over.wait(0.5):
                progress.update(task, completed=(recorder.folder / LOG).read_bytes().count(b"\n"))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
