"""IDX, the format of MNIST and its kin: two zero bytes, a type, the number of axes, their lengths, the values."""

import math

import numpy as np
from numpy.typing import NDArray

_UNSIGNED_BYTES = 8


def read_idx(content: bytes, name: str) -> NDArray[np.uint8]:
    """The array of unsigned bytes that an IDX file holds.

    Args:
        content: Of the file, not compressed.
        name: What messages call it.

    Raises:
        ValueError: It is no IDX file, of another type, or of another length than its header says.
    """
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTES:
        raise ValueError(f"{name}: expected an IDX file of unsigned bytes, got {content[:4].hex() or 'nothing'} first")
    axes = content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise ValueError(f"{name}: expected {axes} lengths of 4 bytes, got a file of {len(content)} bytes")
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    if len(content) != start + math.prod(shape):
        raise ValueError(f"{name}: expected {start + math.prod(shape)} bytes for shape {shape}, got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()  # bytes could not be written to
