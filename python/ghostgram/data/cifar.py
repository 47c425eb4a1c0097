"""CIFAR-10 and CIFAR-100 from the files of their authors, which are pickles: read without running what is in them."""

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .packages import DomainUnavailable


class _Layout(NamedTuple):
    folder: str
    train: tuple[str, ...]
    test: str
    labels: str
    meta: str
    names: str
    classes: int


_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{part}" for part in range(1, 6)),
        *("test_batch", "labels", "batches.meta", "label_names", 10),
    ),
    "cifar100": _Layout("cifar-100-python", ("train",), "test", "fine_labels", "meta", "fine_label_names", 100),
}

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


def read(name: str, root: Path) -> tuple[Pixels, Labels, Pixels, Labels, list[str]]:
    """Training images (n, 3, 32, 32) and labels (n,), test images and labels, and the names of classes.

    Args:
        name: "cifar10" or "cifar100".
        root: The folder that holds the authors' folder, as torchvision leaves it.

    Raises:
        DomainUnavailable: A file is missing; the message names it.
        ValueError: A file is not what it should be.
    """
    layout = _LAYOUTS[name]
    folder = root / layout.folder
    parts = [_part(folder / file, layout) for file in layout.train]
    train = np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
    names = _unpickled(folder / layout.meta).get(layout.names)
    if not isinstance(names, list) or len(names) != layout.classes:
        raise ValueError(f"{folder / layout.meta}: expected {layout.classes} {layout.names}, got {names}")
    return *train, *_part(folder / layout.test, layout), names


def _part(path: Path, layout: _Layout) -> tuple[Pixels, Labels]:
    held = _unpickled(path)
    images, labels = held.get("data"), np.array(held.get(layout.labels), np.int64)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (len(labels), 3 * 32 * 32):
        raise ValueError(f"{path}: expected data (n, 3072) of uint8 and n labels")
    if labels.min() < 0 or labels.max() >= layout.classes:
        raise ValueError(
            f"{path}: expected labels from 0 to {layout.classes - 1}, got {labels.min()} to {labels.max()}"
        )
    return images.reshape(-1, 3, 32, 32), labels


def _unpickled(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise DomainUnavailable(f"{path} is not there")
    try:
        held = _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()  # strings of Python 2
    except (pickle.UnpicklingError, EOFError) as why:
        raise ValueError(f"{path}: expected a pickle of CIFAR, got a file that does not read as one ({why})") from why
    if not isinstance(held, dict):
        raise ValueError(f"{path}: expected a dictionary, got {type(held).__name__}")
    return held


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # makes an empty array to be filled; where NumPy has it has changed
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class _Unpickler(pickle.Unpickler):
    """Makes arrays and what Python has literals for, and nothing else: a pickle could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return _ALLOWED[module, name]
