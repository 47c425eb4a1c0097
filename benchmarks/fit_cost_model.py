"""Fits the constants of ops/cost_model.py to this machine: `python benchmarks/fit_cost_model.py [norms|dots|gram ...]`.

Non-negative least squares of relative errors over the fitted grid of ways.py, a way at a time.
"""

from __future__ import annotations

import sys

import numpy as np
from ways import FITTED, WAYS, Shape, grid, measure

from ghostgram.ops import cost_model


def terms(shape: Shape, way: str) -> tuple[float, ...]:
    """What the cost model counts."""
    sizes = (shape.samples, shape.tokens, shape.d, shape.p)
    if shape.want == "norms":
        return cost_model.norms_terms(*sizes)[way]
    if shape.want == "dots":
        return cost_model.dots_terms(*sizes, shape.directions)[way]
    return cost_model.gram_terms(*sizes, shape.second)[way]


def non_negative(matrix: np.ndarray, target: np.ndarray, sweeps: int = 3_000) -> np.ndarray:
    """argmin_{x >= 0} |matrix x - target|, coordinate by coordinate; columns are scaled to unit length first."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1
    gram, projected = (matrix / scale).T @ (matrix / scale), (matrix / scale).T @ target
    x = np.zeros(len(projected))
    for _ in range(sweeps):
        for k in range(len(x)):
            x[k] = max(0.0, x[k] + (projected[k] - gram[k] @ x) / max(gram[k, k], 1e-30))
    return x / scale


def main() -> None:
    """Measures, fits, and prints the constants with the median error of the times they predict."""
    for want in sys.argv[1:] or WAYS:
        shapes = grid(want, FITTED)
        times = measure(shapes)
        for way in WAYS[want]:
            counted = np.array([terms(shape, way) for shape in shapes], float)
            measured = 1e9 * np.array([took[way] for took in times])
            constants = non_negative(counted / measured[:, None], np.ones(len(shapes)))
            error = np.median(np.abs(counted @ constants / measured - 1))
            values = ", ".join(f"{x:.3g}" for x in constants)
            print(f'    ("{want}", "{way}"): ({values}),  # {len(shapes)} shapes, median error {error:.0%}')


if __name__ == "__main__":
    main()
