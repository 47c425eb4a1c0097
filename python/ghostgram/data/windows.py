"""Fixed-length byte windows: the training documents of a byte-level language model."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def split(documents: Sequence[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Holds out whole documents, so that nothing of a training document is ever in the validation set.

    Args:
        documents: At least two.
        fraction: The share to hold out; at least one document is, and at least one is not.
        seed: Of the draw.

    Returns:
        The documents to train on, and those held out.
    """
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} documents cannot be split by document")
    held_out = min(max(round(fraction * len(documents)), 1), len(documents) - 1)
    order = np.random.default_rng(seed).permutation(len(documents))
    return [documents[i] for i in order[held_out:]], [documents[i] for i in order[:held_out]]


def windows(documents: Sequence[str], length: int, count: int, seed: int, *, absent_from: Sequence[str] = ()) -> Bytes:
    """Draws windows of UTF-8 bytes that neither overlap nor cross from one document into another.

    Every document is cut into back-to-back slots from a random offset; the windows are slots drawn without
    replacement, so a long document gives proportionally many and one shorter than a window gives none.

    Args:
        documents: The texts to draw from.
        length: Bytes of a window.
        count: Windows wanted.
        seed: Of the draw.
        absent_from: A window is passed over if either half of it stands in one of these texts word for word.
            Whole documents held out still share boilerplate, such as licences, with those trained on.

    Returns:
        (count, length) bytes.

    Raises:
        ValueError: The documents do not hold `count` such windows.
    """
    generator = np.random.default_rng(seed)
    texts = [document.encode("utf-8", "replace") for document in documents]
    slots = np.array([len(text) // length for text in texts], np.int64)
    offsets = generator.integers(0, [len(text) - n * length + 1 for text, n in zip(texts, slots, strict=True)])
    ends = np.cumsum(slots)
    elsewhere = "\0".join(absent_from).encode("utf-8", "replace")
    drawn: list[bytes] = []
    for slot in generator.permutation(int(slots.sum())):
        if len(drawn) == count:
            break
        owner = int(np.searchsorted(ends, slot, side="right"))
        start = int(offsets[owner] + (slot - ends[owner] + slots[owner]) * length)
        window = texts[owner][start : start + length]
        if window[: length // 2] not in elsewhere and window[length // 2 :] not in elsewhere:
            drawn.append(window)
    if len(drawn) < count:
        raise ValueError(f"{len(documents)} documents hold {len(drawn)} windows of {length} bytes, not {count}")
    return np.frombuffer(b"".join(drawn), np.uint8).reshape(count, length)


def corrupt(
    clean: Bytes, fraction: float, seed: int, kind: Literal["shuffle", "noise"] = "shuffle"
) -> tuple[Bytes, NDArray[np.bool_]]:
    """Spoils a share of the windows.

    Args:
        clean: (count, length) bytes; left as they are.
        fraction: The share to spoil, rounded to whole windows.
        seed: Of the draw of windows and of what happens to them.
        kind: "shuffle" permutes the bytes inside a window, which keeps its alphabet and destroys its language;
            "noise" replaces them by uniform random bytes.

    Returns:
        The windows in the same order, and (count,) whether each is corrupted.
    """
    generator = np.random.default_rng(seed)
    spoiled = clean.copy()
    is_corrupted = np.zeros(len(clean), np.bool_)
    is_corrupted[generator.choice(len(clean), round(fraction * len(clean)), replace=False)] = True
    if kind == "shuffle":
        spoiled[is_corrupted] = generator.permuted(clean[is_corrupted], axis=1)
    elif kind == "noise":
        spoiled[is_corrupted] = generator.integers(0, 256, clean[is_corrupted].shape, np.uint8)
    else:
        raise ValueError(f"no corruption {kind!r}; there are shuffle and noise")
    return spoiled, is_corrupted
