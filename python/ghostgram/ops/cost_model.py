"""Which exact way is fastest: M materialises tiles of gradients, G multiplies tokens, P scores tokens by a GEMM.

The nanoseconds below were fitted to measured times; docs/cost_model.md has the grid, the fit and its regret. Only
ratios matter, so a faster machine of the same balance chooses alike.
"""

from __future__ import annotations

DIRECTIONS_AT_ONCE = 16
"""How many gradients of a second side are materialised at a time for the gram."""


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
    shape = (samples, tokens, d, p)
    costs = {"norms": _norms(*shape), "dots": _dots(*shape, directions), "gram": _gram(*shape, second)}[want]
    return min(ways, key=lambda way: costs[way])


def _norms(samples: int, tokens: int, d: int, p: int) -> dict[str, float]:
    rows = samples * tokens
    padded = -(-tokens // 4) * 4  # G works on four tokens at a time
    return {
        "M": 28_500 + 0.65 * rows * (d + p) + 0.0124 * rows * d * p + 0.046 * samples * d * p,
        "G": 26_200 + (0.36 + 0.0101 * (padded + 4)) * samples * padded * (d + p),
    }


def _dots(samples: int, tokens: int, d: int, p: int, directions: int) -> dict[str, float]:
    rows = samples * tokens
    return {
        "M": 28_800
        + 0.52 * rows * (d + p)
        + (0.0145 * rows + 0.038 * samples * (directions + 1) + 0.27 * directions) * d * p,
        "P": directions * (16_500 + 0.41 * rows * (d + p) + (0.0135 * rows + 0.25) * d * p),
    }


def _gram(samples: int, tokens: int, d: int, p: int, second: tuple[int, int] | None) -> dict[str, float]:
    samples2, tokens2 = second or (samples, tokens)
    rows, rows2 = samples * tokens, samples2 * tokens2
    packed, pairs = (rows + rows2, rows * rows2) if second else (rows, rows * rows / 2)
    passes = -(-samples2 // DIRECTIONS_AT_ONCE)
    multiplied = rows2 + passes * rows
    return {
        "G": 31_100 + (0.93 * packed + 0.018 * pairs) * (d + p) + 13 * samples * samples2,
        "M": 37_600 * samples2
        + 0.45 * multiplied * (d + p)
        + (0.020 * multiplied + 0.079 * samples2 * (1 + samples) + 0.026 * passes * samples) * d * p,
    }
