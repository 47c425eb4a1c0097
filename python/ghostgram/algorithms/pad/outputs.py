"""A distilled set as a file: what it takes to train on it, and what it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ghostgram._files import whole_file, write_arrays


@dataclass(frozen=True, eq=False)
class DistilledSet:
    """A few synthetic images that a net trained on them learns much from.

    Examples:
        >>> distilled = DistilledSet.load("run/distilled.npz")  # doctest: +SKIP
        >>> optimizer = torch.optim.SGD(net.parameters(), distilled.beta, momentum=0.9, weight_decay=5e-4)
        >>> for _ in range(1000):
        ...     F.cross_entropy(net(distilled.images), distilled.targets).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    images: Tensor
    """(n, C, H, W) as nets train on them, class by class."""
    pixels: Tensor
    """(n, C, H, W) the same before whitening, where training images are within [0, 1]; these may leave it."""
    labels: Tensor
    """(n,) int64, the class that each image began in."""
    label_logits: Tensor | None
    """(n, classes), None where labels are hard."""
    beta: float
    """The learned step size, for SGD."""
    classes: list[str]
    """The names of the classes, by their numbers."""
    whitening: str
    """The digest of what makes images of pixels: test images must be made so too."""
    config: dict[str, Any] = field(default_factory=dict)
    """The run's settings, and the digests of what it was made from."""
    results: dict[str, Any] = field(default_factory=dict)
    """Accuracies of nets trained on it, by what they were measured on."""

    @property
    def ipc(self) -> int:
        """Images per class."""
        return len(self.images) // len(self.classes)

    @property
    def targets(self) -> Tensor:
        """(n, classes) probabilities, as torch's cross_entropy takes them."""
        if self.label_logits is None:
            return F.one_hot(self.labels, len(self.classes)).to(self.images)
        return self.label_logits.softmax(1)

    def save(self, path: str | Path) -> None:
        """Writes the set as .pt or .npz, by the path's suffix; whole or not at all, and without pickled objects.

        Raises:
            ValueError: The suffix is another.
        """
        path, whole = _known(path), self._as_arrays()
        if path.suffix == ".npz":
            write_arrays(path, **whole)
            return
        tensors = {name: torch.as_tensor(x) if isinstance(x, np.ndarray) else x for name, x in whole.items()}
        with whole_file(path) as temporary:
            torch.save(tensors, temporary)

    @classmethod
    def load(cls, path: str | Path) -> DistilledSet:
        """Reads what `save` wrote, onto the CPU.

        Raises:
            ValueError: The suffix is neither .pt nor .npz, or the file holds something else.
        """
        if _known(path).suffix == ".pt":
            whole = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with np.load(path, allow_pickle=False) as file:
                whole = {name: file[name] for name in file.files}
        if missing := {"images", "pixels", "labels", "beta", "facts"} - set(whole):
            raise ValueError(f"{path}: expected a distilled set, got a file without {', '.join(sorted(missing))}")
        images, pixels, labels = (torch.as_tensor(whole[name]) for name in ("images", "pixels", "labels"))
        logits = torch.as_tensor(whole["label_logits"]) if "label_logits" in whole else None
        return cls(images, pixels, labels, logits, float(whole["beta"]), **json.loads(str(whole["facts"])))

    def _as_arrays(self) -> dict[str, Any]:
        facts = {"classes": self.classes, "whitening": self.whitening, "config": self.config, "results": self.results}
        tensors = {"images": self.images, "pixels": self.pixels, "labels": self.labels, "targets": self.targets}
        if self.label_logits is not None:
            tensors["label_logits"] = self.label_logits
        arrays = {name: x.detach().cpu().numpy() for name, x in tensors.items()}
        return {**arrays, "beta": self.beta, "ipc": self.ipc, "facts": json.dumps(facts)}


def _known(path: str | Path) -> Path:
    if Path(path).suffix not in (".pt", ".npz"):
        raise ValueError(f"path: expected one that ends with .pt or .npz, got {path}")
    return Path(path)
