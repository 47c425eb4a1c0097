"""A file of settings as a run of PAD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghostgram.algorithms.pad import Run


@dataclass(frozen=True)
class Data:
    """Where images come from."""

    name: str
    """Of `ghostgram.data.load_images`: digits, fashion-mnist, mnist-5k, cifar10, cifar100."""
    root: str | None = None
    """The folder of data that has to be there already."""
    samples: int | None = None
    """So many training images, as many of each class as there are in proportion; None: all."""


@dataclass(frozen=True)
class Job:
    """What a file of settings says.

        run: runs/digits
        preset: digits-10
        data: {name: digits}
        settings: {iterations: 500}

    Raises:
        ValueError: A key is unknown or missing, or a value is not as said.
    """

    run: str
    preset: str
    data: Data
    shared: str | None = None
    workers: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Job:
        """Reads a YAML file."""
        import yaml

        try:
            given = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, yaml.YAMLError) as why:
            raise ValueError(f"{path}: cannot be read: {why}") from why
        whole = _checked(cls, given, str(path))
        return cls(**{**whole, "data": Data(**_checked(Data, whole["data"], f"{path}: data"))})

    def begin(self, *, allow_changes: tuple[str, ...] = (), progress: bool = True) -> Run:
        """The run: nothing is trained yet.

        Raises:
            ValueError: A setting or the data are not as said.
            ghostgram.data.DomainUnavailable: The data cannot be had here.
        """
        import torch

        from ghostgram.algorithms.pad import Run, Settings, preset
        from ghostgram.algorithms.pad.controls import split
        from ghostgram.data import load_images

        settings = Settings.from_mapping(self.settings, preset(self.preset))
        found = load_images(self.data.name, **({"root": self.data.root} if self.data.root else {}))
        images, labels = torch.from_numpy(found.train_images), torch.from_numpy(found.train_labels)
        if self.data.samples is not None:
            if not 0 < self.data.samples <= len(labels):
                raise ValueError(f"samples: expected 1 to {len(labels)}, got {self.data.samples}")
            chosen = split(labels.numpy(), self.data.samples / len(labels), settings.seed_of_data).held_out
            images, labels = images[chosen], labels[chosen]
        return Run(
            images, labels, self.run, settings, test=(found.test_images, found.test_labels), classes=found.classes,
            shared=self.shared, allow_changes=allow_changes, workers=self.workers, progress=progress,
        )  # fmt: skip


def _checked(kind: type, given: Any, place: str) -> dict[str, Any]:
    """A mapping with the keys of a dataclass, and no others."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{place}: expected names and values, got {given!r}")
    known = {each.name: each for each in fields(kind)}
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{place}: no such key: {', '.join(map(str, unknown))}; expected some of {', '.join(known)}")
    needed = [name for name in list(known)[: 3 if kind is Job else 1] if name not in given]
    if needed:
        raise ValueError(f"{place}: {', '.join(needed)} is missing")
    return dict(given)
