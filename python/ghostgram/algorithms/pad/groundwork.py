"""What a distillation stands on: split and whitened images, how hard they are, and the experts trained on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ghostgram._files import write_atomically
from ghostgram.algorithms.pad.augment import Dsa
from ghostgram.algorithms.pad.controls import split
from ghostgram.algorithms.pad.convnet import ConvNet
from ghostgram.algorithms.pad.experts import record
from ghostgram.algorithms.pad.flat import Flat
from ghostgram.algorithms.pad.identity import digest_of
from ghostgram.algorithms.pad.pixels import as_labels, as_pixels, whitening
from ghostgram.algorithms.pad.schedule import DifficultySchedule
from ghostgram.algorithms.pad.scores import Scores, score
from ghostgram.algorithms.pad.settings import Settings
from ghostgram.algorithms.pad.state import refuse_changes
from ghostgram.algorithms.pad.store import LOG, Store
from ghostgram.training.ranks import led


class Groundwork:
    """The data of a run and its experts, in a folder that runs share which differ in distillation alone.

        data.json, whitening.npz        what the images are, and what was done to them
        scores-<key>.npz, scores-<key>/  how hard each image is, and by each model that says so
        experts-<key>/                  the experts' trajectories

    A key names all that a file depends on: a run with other settings makes files of its own beside them.

    Args:
        images: (n, C, H, H) floating in [0, 1], or uint8; on the device that all shall run on.
        labels: (n,) integers, 0 <= y < classes.
        folder: Where the files go.
        settings: Of the run.
        classes: The names of the classes; their numbers by default.
        model: Makes the student, on the CPU and drawing by torch alone; ConvNet(width, depth) by default.
        allow_changes: Names of data.json that may be other than before.
        workers: Processes that train experts.
        progress: Whether bars show how far it is.

    Attributes:
        images: (n', C, H, H) the whitened training images, without those held out for validation.
        labels: (n',) theirs.
        val_images: (n - n', C, H, H) those held out, whitened.
        val_labels: (n - n',) theirs.
        whitening: What was done to pixels.
        made_from: Digests and settings that all files depend on.

    Raises:
        TypeError: images or labels are of another dtype.
        ValueError: Shapes, pixels or labels are not as said.
        ChangedError: The folder was begun with other data.
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        folder: Path,
        settings: Settings,
        *,
        classes: Sequence[str] | None = None,
        model: Callable[[], nn.Module] | None = None,
        allow_changes: Sequence[str] = (),
        workers: int = 1,
        progress: bool = True,
    ) -> None:
        pixels = as_pixels(images, "images")
        truth = as_labels(labels, pixels, len(classes) if classes else None, "labels")
        self.classes = [str(c) for c in (classes or range(int(truth.max()) + 1))]
        self.settings, self.folder, self.device = settings, folder, pixels.device
        self._workers, self._progress = workers, progress
        channels, size = pixels.shape[1], pixels.shape[2]
        self.make_model = model or partial(ConvNet, channels, len(self.classes), settings.width, settings.depth, size)
        # Weights are an argument of the flat model: those it is made with are never seen, so nothing has to be drawn.
        with torch.random.fork_rng(devices=[]):
            self.flat = Flat(self.make_model().to(self.device))
        self.augment = Dsa(settings.seed_of_data, size) if settings.augment else None
        """Of experts; students and nets that are judged have that of the run's seed."""

        kept, held_out, drawn = np.arange(len(truth)), np.arange(0), "none"
        if settings.val_fraction:
            kept, held_out, drawn = split(truth.cpu().numpy(), settings.val_fraction, settings.seed_of_data)
        sizes = torch.bincount(truth[kept].cpu(), minlength=len(self.classes))
        if (least := int(sizes.min())) < settings.ipc:
            raise ValueError(f"ipc: expected at most {least}, the images of class {sizes.argmin()}, got {settings.ipc}")
        self.made_from: dict[str, Any] = {
            "dataset": digest_of(pixels, truth), "held_out": drawn, "whitening": settings.whitening,
            "zca_eps": settings.zca_eps,
        }  # fmt: skip
        led(lambda: self._claim(allow_changes))
        self.whitening = led(lambda: whitening(settings, pixels[kept], folder / "whitening.npz"))
        self.made_from["whitening_digest"] = self.whitening.digest
        self.images, self.labels = self.whitening.apply(pixels[kept]), truth[kept]
        self.val_images, self.val_labels = self.whitening.apply(pixels[held_out]), truth[held_out]

    @cached_property
    def scores(self) -> Scores:
        """How hard each training image is: read, or computed and kept."""
        s = self.settings
        name = f"scores-{key({**self.made_from, **self._scored_by()})}"

        def made() -> Scores:
            path = self.folder / f"{name}.npz"
            if not path.exists():
                score(
                    self.make_model, self.images, self.labels, s.scorer,
                    runs=s.scorer_runs, epoch=s.scorer_epoch, seed=s.seed_of_data, folder=self.folder / name,
                ).save(path)  # fmt: skip
            return Scores.load(path)

        return led(made)

    @cached_property
    def schedule(self) -> DifficultySchedule | None:
        """Which images each epoch of the experts has; None for all."""
        s = self.settings
        return DifficultySchedule(self.scores, s.init_ratio, s.add_end, s.removals) if s.recipe == "pad" else None

    @cached_property
    def store(self) -> Store:
        """The experts: trained, or, once they are, opened."""
        s = self.settings
        return led(
            lambda: record(
                self.make_model, self.images, self.labels, self.folder / f"experts-{self.experts_key}", s.recipe,
                experts=s.experts, epochs=s.expert_epochs, batch=s.expert_batch, schedule=self.schedule,
                augment=self.augment, validation=(self.val_images, self.val_labels) if len(self.val_labels) else None,
                seed=s.seed_of_data, keep=s.kept_epochs, group=s.group, facts=self.made_from,
                workers=self._workers, progress=self._progress,
            )
        )  # fmt: skip

    @property
    def experts_key(self) -> str:
        """Of all that the experts depend on."""
        s = self.settings
        how = {
            "recipe": s.recipe, "experts": s.experts, "epochs": s.expert_epochs, "batch": s.expert_batch,
            "augment": s.augment, "kept": s.kept_epochs, "group": s.group, "model": self._model_text(),
            "seed": s.seed_of_data,
        }  # fmt: skip
        filters = {"init_ratio": s.init_ratio, "add_end": s.add_end, "removals": s.removals, **self._scored_by()}
        return key({**self.made_from, **how, **(filters if s.recipe == "pad" else {})})

    @property
    def experts_digest(self) -> str:
        """Of what the experts' store says of its rows: their digests among it."""
        lines = (Path(self.store.folder) / LOG).read_text("utf-8").splitlines()
        return hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=16).hexdigest()

    def _scored_by(self) -> dict[str, Any]:
        s = self.settings
        return {
            "scorer": s.scorer, "runs": s.scorer_runs, "epoch": s.scorer_epoch, "model": self._model_text(),
            "seed": s.seed_of_data,
        }  # fmt: skip

    def _model_text(self) -> str:
        return f"{self.flat.module} {self.flat.names} {[tuple(shape) for shape in self.flat.shapes]}"

    def _claim(self, allow_changes: Sequence[str]) -> None:
        """Writes what the folder is of, or refuses it if it is of something else."""
        path = self.folder / "data.json"
        if path.exists():
            refuse_changes(json.loads(path.read_text("utf-8")), self.made_from, allow_changes, self.folder)
        else:
            write_atomically(path, json.dumps(self.made_from, indent=2))


def key(settings: Mapping[str, Any]) -> str:
    """A short name for settings: the same for the same values, whatever their order."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
