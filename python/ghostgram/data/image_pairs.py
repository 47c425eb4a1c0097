"""Map-style data sets of images and labels, such as torchvision's, as arrays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def image_arrays(pairs: Sequence[tuple[Any, int]]) -> tuple[NDArray[np.uint8] | NDArray[np.float32], NDArray[np.int64]]:
    """Reads a data set of (image, label) once, into what `ghostgram.pad` takes.

    As for torchvision's transforms, images of PIL and NumPy arrays are (H, W) or (H, W, C), torch's tensors (H, W) or
    (C, H, W). All are of one size, without augmentation: `pad` has its own.

    Args:
        pairs: Has a length and items by number, as `torchvision.datasets.CIFAR10(root)`.

    Returns:
        (n, C, H, W) images, uint8 from 0 to 255 or float32 from 0 to 1 as the items are, and (n,) int64 labels.

    Raises:
        ValueError: There is no item, one is no such pair, or images differ in size, type or range; the message names
            the item.
    """
    images: list[NDArray[Any]] = []
    labels: list[int] = []
    for i in range(len(pairs)):
        try:
            image, label = pairs[i]
            images.append(_pixels(image))
            labels.append(int(label))
        except (TypeError, ValueError) as why:
            raise ValueError(f"pairs: expected an image and the number of its class, got item {i}: {why}") from why
        if (images[i].shape, images[i].dtype) != (images[0].shape, images[0].dtype):
            raise ValueError(
                f"pairs: expected images like the first one, {images[0].dtype} {images[0].shape}, "
                f"got {images[i].dtype} {images[i].shape} at item {i}"
            )
    if not images:
        raise ValueError("pairs: expected at least one image, got none")
    return np.stack(images), np.array(labels, np.int64)


def _pixels(image: Any) -> NDArray[Any]:
    """One image as (C, H, W)."""
    torch = sys.modules.get("torch")
    tensor = torch is not None and isinstance(image, torch.Tensor)
    pixels = np.asarray(image.detach().cpu() if tensor else image)
    if pixels.ndim == 2:
        pixels = pixels[None] if tensor else pixels[..., None]
    if pixels.ndim != 3 or pixels.dtype.kind not in "uf" or (pixels.dtype.kind == "u" and pixels.dtype != np.uint8):
        raise ValueError(f"expected two or three axes of uint8 or floats, got {pixels.dtype} {pixels.shape}")
    if pixels.dtype.kind == "f":
        if not (pixels.min(initial=0) >= 0 and pixels.max(initial=0) <= 1):
            raise ValueError(f"expected floats from 0 to 1, got {pixels.min():.3g} to {pixels.max():.3g}")
        pixels = pixels.astype(np.float32)
    return pixels if tensor else np.moveaxis(pixels, -1, 0)
