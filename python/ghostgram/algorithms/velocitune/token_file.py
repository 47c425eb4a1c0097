"""A file of token numbers as a dataset of packed rows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset

SAMPLED = 64
"""Blocks of 4 KiB, evenly spread, that the fingerprint of a file reads."""


class TokenFile(Dataset[Tensor]):
    """Rows of equal length of a raw file of token numbers, which is mapped into memory and never read whole.

    Args:
        path: The file: token numbers one after another, without a header.
        length: Tokens of a row.
        dtype: Of the numbers in the file, an integer type.
        stride: Tokens from the start of a row to the next one's; None for `length`. `length - 1` gives rows whose last
            token is the next one's first, so that every token of the file but the first is predicted once.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: The type is not one of integers.
        ValueError: The file does not hold whole numbers, or not one row; or a length is less than 1.

    Cost:
        A row is one read of `length` numbers, converted to int64.
    """

    def __init__(
        self, path: str | Path, length: int, dtype: DTypeLike = "uint16", *, stride: int | None = None
    ) -> None:
        self.path, self.length, self.dtype = Path(path), length, np.dtype(dtype)
        self.stride = length if stride is None else stride
        if self.dtype.kind not in "iu":
            raise TypeError(f"dtype: expected a type of integers, got {self.dtype}")
        if length < 1 or self.stride < 1:
            raise ValueError(f"length, stride: expected at least 1, got {length} and {self.stride}")
        size = self.path.stat().st_size
        if size % self.dtype.itemsize:
            raise ValueError(f"path: expected whole {self.dtype} numbers, got {size} bytes in {self.path}")
        self.tokens = size // self.dtype.itemsize
        """Numbers in the file; those after the last whole row are never read."""
        if self.tokens < length:
            raise ValueError(f"path: expected at least one row of {length} tokens, got {self.tokens} in {self.path}")
        self._map: NDArray[Any] | None = None

    def __len__(self) -> int:
        return (self.tokens - self.length) // self.stride + 1

    def __getitem__(self, row: int) -> Tensor:
        if not 0 <= row < len(self):
            raise IndexError(f"row: expected 0 to {len(self) - 1}, got {row}")
        if self._map is None:
            self._map = np.memmap(self.path, self.dtype, "r")
        start = row * self.stride
        return torch.from_numpy(self._map[start : start + self.length].astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}  # another process maps the file itself

    @property
    def fingerprint(self) -> str:
        """BLAKE2b of sizes, type and 64 blocks of 4 KiB spread over the file: a change between blocks is not seen."""
        digest = hashlib.blake2b(f"{self.tokens} {self.dtype} {self.length} {self.stride}".encode(), digest_size=16)
        size = self.tokens * self.dtype.itemsize
        with self.path.open("rb") as file:
            for place in range(SAMPLED):
                file.seek(max(0, size - 4096) * place // (SAMPLED - 1))
                digest.update(file.read(4096))
        return digest.hexdigest()
