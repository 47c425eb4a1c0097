"""Images as nets see them: checked, as floating point, whitened; and back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ghostgram._files import write_arrays
from ghostgram.algorithms.pad.images.zca import Zca
from ghostgram.algorithms.pad.settings import Settings


class Whitening(Protocol):
    """What makes images of pixels."""

    @property
    def digest(self) -> str:
        """Of all that it is, to the bit."""
        ...

    def apply(self, images: Tensor) -> Tensor:
        """(n, C, H, W) images of pixels in [0, 1]."""
        ...

    def inverse(self, images: Tensor) -> Tensor:
        """(n, C, H, W) pixels of images."""
        ...

    def save(self, path: str | Path) -> None:
        """Writes an .npz, whole or not at all."""
        ...


@dataclass(frozen=True, eq=False)
class Standard:
    """Each channel shifted and scaled, to mean 0 and deviation 1 over the images it is fitted to."""

    mean: Tensor
    """(C,) float64"""
    deviation: Tensor
    """(C,) float64, above 0"""

    @classmethod
    def fit(cls, images: Tensor) -> Standard:
        """Fits to (n, C, H, W) pixels; a channel without variance is only shifted."""
        channels = images.detach().double().transpose(0, 1).flatten(1)
        deviation = channels.std(1, correction=0)
        return cls(channels.mean(1).cpu(), torch.where(deviation > 0, deviation, 1.0).cpu())

    @classmethod
    def none(cls, channels: int) -> Standard:
        """The one that changes nothing."""
        return cls(torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64))

    def apply(self, images: Tensor) -> Tensor:
        """(x - mean) / deviation, of the images' dtype."""
        return (images - _by_channel(self.mean, images)) / _by_channel(self.deviation, images)

    def inverse(self, images: Tensor) -> Tensor:
        """x deviation + mean."""
        return images * _by_channel(self.deviation, images) + _by_channel(self.mean, images)

    @property
    def digest(self) -> str:
        """BLAKE2b-128 of both."""
        return hashlib.blake2b(
            self.mean.numpy().tobytes() + self.deviation.numpy().tobytes(), digest_size=16
        ).hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes an .npz."""
        write_arrays(Path(path), mean=self.mean.numpy(), deviation=self.deviation.numpy())

    @classmethod
    def load(cls, path: str | Path) -> Standard:
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(torch.from_numpy(file["mean"]), torch.from_numpy(file["deviation"]))


def whitening(settings: Settings, pixels: Tensor, path: Path) -> Whitening:
    """The whitening of a run: read if it was fitted before (its last bits depend on the machine), fitted if not."""
    if settings.whitening == "zca":
        found: Whitening = Zca.load(path) if path.exists() else Zca.fit(pixels, settings.zca_eps)
    elif settings.whitening == "standard":
        found = Standard.load(path) if path.exists() else Standard.fit(pixels)
    else:
        found = Standard.none(pixels.shape[1])
    if not path.exists():
        found.save(path)
    return found


def as_pixels(images: Any, name: str) -> Tensor:
    """(n, C, H, H) images in [0, 1] as float32; uint8 ones are divided by 255.

    Raises:
        TypeError: They are neither floating point nor uint8.
        ValueError: They have another shape, are not square, or leave [0, 1].
    """
    pixels = torch.as_tensor(images)
    if pixels.ndim != 4 or pixels.shape[2] != pixels.shape[3] or not pixels.numel():
        raise ValueError(f"{name}: expected square images (n, C, H, H), got shape {tuple(pixels.shape)}")
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if pixels.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected uint8, float32 or float64, got {pixels.dtype}")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name}: expected pixels in [0, 1], got {low:.4g} to {high:.4g}")
    return pixels.float()


def as_labels(labels: Any, images: Tensor, classes: int | None, name: str) -> Tensor:
    """(n,) int64 classes, one for each image.

    Raises:
        TypeError: They are no integers.
        ValueError: They are not (n,), or outside 0 ... classes - 1.
    """
    found = torch.as_tensor(labels)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {found.dtype}")
    if found.shape != images.shape[:1]:
        raise ValueError(f"{name}: expected shape ({len(images)},), one for each image, got {tuple(found.shape)}")
    low, high = int(found.min()), int(found.max())
    if low < 0 or (classes is not None and high >= classes):
        raise ValueError(f"{name}: expected 0 <= y" + (f" < {classes}" if classes else "") + f", got {low} to {high}")
    return found.long().to(images.device)


def _by_channel(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images)[:, None, None]
