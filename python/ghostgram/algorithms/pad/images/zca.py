"""ZCA whitening: images whose pixels are uncorrelated, as near to the originals as such images can be."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ghostgram import _arrays
from ghostgram._files import write_arrays

ROWS = 4096
"""Images that are in float64 at a time."""


@dataclass(frozen=True, eq=False)
class Zca:
    """A whitening fitted to training images, to be applied to these, to any others, and undone.

    With the mean mu of the pixels and their covariance S = U diag(s) U^T,

        x' = (x - mu) W,  W = U diag(s + eps)^-1/2 U^T,        x = x' W^-1 + mu,  W^-1 = U diag(s + eps)^1/2 U^T

    so the covariance of x' is U diag(s / (s + eps)) U^T. It is no more than about 1 along any direction, and directions
    that hardly vary (s far below eps) stay so: noise is not blown up.

    Fit once and save: another machine or another number of threads gives the same whitening up to rounding, with
    another digest.
    """

    mean: Tensor
    """(d,) float64, mu; d = C H W."""
    variances: Tensor
    """(d,) float64, s, ascending."""
    axes: Tensor
    """(d, d) float64, U: axes[:, j] is the direction whose variance is variances[j]."""
    shape: tuple[int, int, int]
    """(C, H, W) of an image."""
    eps: float

    @classmethod
    def fit(cls, images: Tensor, eps: float = 0.1) -> Zca:
        """Fits a whitening to raw images.

        Args:
            images: (n, C, H, W) floating point in [0, 1]: training images alone, without those held out for validation,
                and without normalising by mean and standard deviation. S is divided by n - 1.
            eps: Is added to the variances, in the square of the images' unit: .1 is meant for pixels in [0, 1].

        Returns:
            The whitening, on the CPU.

        Raises:
            TypeError: images are no floating point.
            ValueError: images are not (n, C, H, W) with n >= 2, hold a pixel outside [0, 1], or eps is not positive.

        Cost:
            n d^2 FLOPs for the covariance and about 10 d^3 for its eigenvectors, all in float64; 8 (2 d^2 + 4096 d)
            bytes. d is 3,072 for CIFAR, 12,288 for Tiny ImageNet.

        Source:
            PAD (arXiv 2408.03360) takes it from MTT (arXiv 2203.11932), with eps .1.
        """
        _arrays.floating(images, "images")
        if images.ndim != 4 or len(images) < 2:
            raise ValueError(f"images: expected (n, C, H, W) with n >= 2, got shape {tuple(images.shape)}")
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"images: expected raw pixels in [0, 1], got {low} to {high}")
        if not eps > 0:
            raise ValueError(f"eps: expected a positive number, got {eps}")
        rows = images.detach().flatten(1)
        parts = torch.split(rows, ROWS)
        mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(rows)
        covariance = mean.new_zeros(len(mean), len(mean))
        for part in parts:
            centred = part.double() - mean
            covariance.addmm_(centred.T, centred)
        variances, axes = torch.linalg.eigh(covariance / (len(rows) - 1))
        channels, height, width = images.shape[1:]
        return cls(mean.cpu(), variances.cpu(), axes.cpu(), (channels, height, width), float(eps))

    def apply(self, images: Tensor) -> Tensor:
        """Whitened images: (n, C, H, W) of the images' dtype and device. Linear algebra in float64, 2 n d^2 FLOPs."""
        return self._by_parts(images, lambda x: (x - self.mean.to(x)) @ self._whitening.to(x))

    def inverse(self, images: Tensor) -> Tensor:
        """What `apply` made whitened images of; of learned ones, what they look like (pixels may leave [0, 1])."""
        return self._by_parts(images, lambda x: x @ self._colouring.to(x) + self.mean.to(x))

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-128 of all that the whitening is, to the bit, as 32 hexadecimal digits."""
        running = hashlib.blake2b(repr((self.shape, self.eps)).encode(), digest_size=16)
        for part in (self.mean, self.variances, self.axes):
            running.update(np.ascontiguousarray(part.numpy(), "<f8").data)
        return running.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes an .npz without pickles, whole or not at all."""
        mean, variances, axes = (x.numpy() for x in (self.mean, self.variances, self.axes))
        write_arrays(
            Path(path), mean=mean, variances=variances, axes=axes, shape=np.array(self.shape), eps=self.eps,
            digest=self.digest,
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> Zca:
        """Reads what `save` wrote.

        Raises:
            ValueError: The file is damaged, or is something else; the message names it.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, variances, axes = (torch.from_numpy(file[name]) for name in ("mean", "variances", "axes"))
                channels, height, width = file["shape"].tolist()
                loaded = cls(mean, variances, axes, (channels, height, width), float(file["eps"]))
                digest = str(file["digest"])
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as why:
            raise ValueError(f"{path}: expected a saved Zca, got a file that does not read as one ({why})") from why
        if loaded.digest != digest:
            raise ValueError(f"{path}: expected the digest {digest} that it was saved with, got {loaded.digest}")
        return loaded

    @cached_property
    def _whitening(self) -> Tensor:
        return self.axes * (self.variances + self.eps).rsqrt() @ self.axes.T

    @cached_property
    def _colouring(self) -> Tensor:
        return self.axes * (self.variances + self.eps).sqrt() @ self.axes.T

    def _by_parts(self, images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        _arrays.floating(images, "images")
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"images: expected (n, {', '.join(map(str, self.shape))}), got {tuple(images.shape)}")
        parts = [change(part.flatten(1).double()).to(images.dtype) for part in torch.split(images, ROWS)]
        return torch.cat(parts).view_as(images)
