"""Which exact way is fastest: M materialises tiles of gradients, G multiplies tokens, P scores tokens by a GEMM.

A way's time is linear in what it does. The nanoseconds are fitted to measured times by benchmarks/fit_cost_model.py;
docs/cost_model.md has the form, the fit and its regret. Only ratios matter, so a faster machine of the same balance
chooses alike.
"""

from __future__ import annotations

from functools import lru_cache

from ghostgram import _arrays

DIRECTIONS_AT_ONCE = 16
"""How many gradients of a second side are materialised at a time for the gram."""

NANOSECONDS: dict[tuple[str, str], tuple[float, ...]] = {
    ("norms", "M"): (27_800, 0.254, 0.0179, 0.0375),
    ("norms", "G"): (23_400, 0.141, 0.011),
    ("dots", "M"): (41_800, 0.275, 0.0183, 0.0327, 0.169),
    ("dots", "P"): (23_300, 0.235, 0.0206, 0.191),
    ("gram", "G"): (24_500, 0.448, 0.0205, 78.6),
    ("gram", "M"): (43_100, 0.185, 0.0242, 0.0664),
}
"""What each of a way's terms costs."""


def choose_way(
    want: str,
    ways: tuple[str, ...],
    samples: int,
    tokens: int,
    d: int,
    p: int,
    directions: int = 0,
    second: tuple[int, int] | None = None,
) -> str:
    """The cheapest of `ways` ("M", "G", "P") for "norms", "dots" with K directions, or "gram".

    `second` is (B2, T2) of the gram's second side; None is the symmetric gram, half of which is enough for G.
    """
    if len(ways) == 1:
        return ways[0]
    # A choice takes as long as a small kernel. Sizes that are symbols are no keys.
    if not _arrays.traced() and type(samples * tokens * d * p * directions) is int and second is None:
        return _remembered(want, ways, samples, tokens, d, p, directions)
    return _chosen(want, ways, samples, tokens, d, p, directions, second)


def _chosen(
    want: str,
    ways: tuple[str, ...],
    samples: int,
    tokens: int,
    d: int,
    p: int,
    directions: int,
    second: tuple[int, int] | None = None,
) -> str:
    if want == "norms":
        terms = norms_terms(samples, tokens, d, p)
    elif want == "dots":
        terms = dots_terms(samples, tokens, d, p, directions)
    else:
        terms = gram_terms(samples, tokens, d, p, second)
    return min(ways, key=lambda way: sum([x * y for x, y in zip(NANOSECONDS[want, way], terms[way], strict=True)]))


_remembered = lru_cache(maxsize=4096)(_chosen)


def norms_terms(samples: int, tokens: int, d: int, p: int) -> dict[str, tuple[float, ...]]:
    """A constant, what is packed, and multiply-adds; G cuts up to 16 tokens evenly into tiles of at most 4."""
    gradient, packed = _padded(d, p), samples * tokens * (d + p)
    high = -(-tokens // max(1, -(-tokens // 4))) if tokens <= 16 else 4
    padded = -(-tokens // max(1, high)) * high
    pairs = samples * padded * (padded + high) * (d + p)
    return {
        "M": (1, packed, samples * tokens * gradient, samples * gradient),
        "G": (1, packed, pairs),
    }


def dots_terms(samples: int, tokens: int, d: int, p: int, directions: int) -> dict[str, tuple[float, ...]]:
    """A constant, what is packed, multiply-adds, and what is done per sample and per direction."""
    rows, gradient = samples * tokens, _padded(d, p)
    return {
        "M": (1, rows * (d + p), rows * gradient, samples * (directions + 1) * gradient, directions * gradient),
        "P": (directions, directions * rows * (d + p), directions * rows * d * p, directions * d * p),
    }


def gram_terms(
    samples: int, tokens: int, d: int, p: int, second: tuple[int, int] | None
) -> dict[str, tuple[float, ...]]:
    """A constant, what is packed, multiply-adds, and what is done per pair; M goes through the left side in passes."""
    samples2, tokens2 = second or (samples, tokens)
    rows, rows2, gradient = samples * tokens, samples2 * tokens2, _padded(d, p)
    packed, pairs = (rows + rows2, rows * rows2) if second else (rows, rows * rows / 2)
    passes = -(-samples2 // DIRECTIONS_AT_ONCE)
    multiplied = rows2 + passes * rows
    return {
        "G": (1, packed * (d + p), pairs * (d + p), samples * samples2),
        "M": (
            samples2,
            multiplied * (d + p),
            multiplied * gradient,
            samples2 * (1 + samples) * gradient,
        ),
    }


def _padded(d: int, p: int) -> int:
    """Elements of a gradient in whole tiles of 14 x 32, as AVX-512 has them: thin layers leave parts of tiles empty."""
    return -(-d // 32) * 32 * (-(-p // 14) * 14)
