"""DSA: augmentations whose every number is drawn by key, and which are affine in the pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from ghostgram import _arrays
from ghostgram.algorithms.pad import affine, keyed

OPS = ("color", "crop", "cutout", "flip", "scale", "rotate")
"""The operations of DSA, in the order in which one of them is drawn."""


class Drawn(NamedTuple):
    """What was drawn for one batch: enough to apply it again, to the bit."""

    op: str
    """One of `OPS`, the same for the whole batch."""
    parameters: Tensor
    """(n, k) float64 on the CPU, a row for each image. color: b, v, c of the table in `Dsa`. crop: the shifts down and
    right. cutout: the first row and column of the hole, and its side. flip: 1 where mirrored. scale: the factors along
    x and y. rotate: the angle in radians."""


@dataclass(frozen=True)
class Dsa:
    """Differentiable Siamese augmentation, mode S: one operation for a batch, parameters of its own for every image.

    | op | rule, for images of side s |
    |---|---|
    | color | x + b; of that, v times the way from each pixel's mean over channels; of that, c times the way from the |
    | | image's mean; b in [-.5, .5), v in [0, 2), c in [.5, 1.5) |
    | crop | shifted by up to int(.125 s + .5) pixels along both axes, zeros moving in |
    | cutout | a square of side int(.5 s + .5) is 0; it may reach over the border |
    | flip | mirrored left to right, with probability 1/2 |
    | scale | a pixel looks at (sx, sy) times its place from the centre, both in [1/1.2, 1.2); bilinear, zeros outside |
    | rotate | a pixel looks at its place turned by up to 15 degrees about the centre; bilinear, zeros outside |

    Places are those of `affine_grid` and `grid_sample` with align_corners=True. All numbers are uniform.

    Every operation is `A x + b`, so backward needs what was drawn and no activations. It gathers where torch's backward
    of grid_sample scatters by atomics: the same bits every time on a GPU too, in torch's deterministic mode as well.

    Args:
        seed: Any integer.
        size: The side s of the images, which are square.
        ops: The operations to draw from, each once.
        stream: The name of the random numbers' stream: what must not be augmented alike takes another one.

    Raises:
        ValueError: size is not positive, or ops is empty, repeats one, or has one that is not in `OPS`.

    Source:
        Zhao and Bilen (arXiv 2102.08259, section 3.3); the strengths are those of MTT (arXiv 2203.11932) and PAD.
    """

    seed: int
    size: int
    ops: tuple[str, ...] = OPS
    stream: str = "dsa"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: expected at least 1, got {self.size}")
        if not self.ops or len(set(self.ops)) < len(self.ops) or not set(self.ops) <= set(OPS):
            raise ValueError(f"ops: expected some of {', '.join(OPS)}, each once, got {self.ops}")

    def draw(self, counters: Sequence[int], ids: ArrayLike) -> Drawn:
        """Draws the operation of a batch, and the parameters of its images.

        Args:
            counters: Where in the run the batch is, such as (iteration, inner step); they decide the operation.
            ids: (n,) integers. An image's id, with the counters, decides its parameters, whatever else is in the batch:
                so a batch may be done in parts.

        Returns:
            A `Drawn`, equal for equal arguments.
        """
        op = self.ops[keyed.integer(self.seed, f"{self.stream} operation", counters, 0, len(self.ops))]
        count, parameters = _DRAWS[op]
        numbers = keyed.uniforms(self.seed, self.stream, counters, ids, count)
        return Drawn(op, parameters(torch.from_numpy(numbers), self.size))

    def apply(self, drawn: Drawn, x: Tensor) -> Tensor:
        """`A x + b`: the augmented images, differentiably.

        Args:
            drawn: From `draw`, of as many images.
            x: (n, C, size, size) floating point; any values, as of whitened images.

        Returns:
            Of x's shape, dtype and device.

        Raises:
            TypeError: x is no floating point.
            ValueError: x has another shape.

        Cost:
            A few passes over x; the gradient of scale and rotate gathers nine neighbours of every pixel.
        """
        self._check(drawn, x, "x")
        y = affine.linear(drawn.op, x, drawn.parameters)
        # What color adds first goes through its means unchanged, so it may come last.
        return y + affine.for_pixels(drawn.parameters[:, 0], x) if drawn.op == "color" else y

    def adjoint(self, drawn: Drawn, g: Tensor) -> Tensor:
        """`A^T g`: the gradient of `<g, apply(drawn, x)>` with respect to x, from what was drawn alone.

        Args:
            drawn: From `draw`.
            g: (n, C, size, size), like x of `apply`.

        Returns:
            Of g's shape, dtype and device.
        """
        self._check(drawn, g, "g")
        return affine.linear(drawn.op, g, drawn.parameters, transposed=True)

    def _check(self, drawn: Drawn, x: Tensor, name: str) -> None:
        _arrays.floating(x, name)
        if x.ndim != 4 or (len(x), *x.shape[2:]) != (len(drawn.parameters), self.size, self.size):
            expected = f"({len(drawn.parameters)}, C, {self.size}, {self.size})"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")


def _color(u: Tensor, size: int) -> Tensor:
    return torch.stack([u[:, 0] - 0.5, 2 * u[:, 1], u[:, 2] + 0.5], 1)


def _crop(u: Tensor, size: int) -> Tensor:
    most = int(0.125 * size + 0.5)
    return (u * (2 * most + 1)).floor() - most


def _cutout(u: Tensor, size: int) -> Tensor:
    side = int(0.5 * size + 0.5)
    # The centre of a hole of even side lies between pixels: with one place more than pixels both borders are alike.
    first = (u * (size + 1 - side % 2)).floor() - side // 2
    return F.pad(first, (0, 1), value=side)


def _flip(u: Tensor, size: int) -> Tensor:
    return (u < 0.5).to(u)


def _scale(u: Tensor, size: int) -> Tensor:
    return 1 / 1.2 + u * (1.2 - 1 / 1.2)


def _rotate(u: Tensor, size: int) -> Tensor:
    return (2 * u - 1) * math.radians(15)


_DRAWS: dict[str, tuple[int, Callable[[Tensor, int], Tensor]]] = {
    "color": (3, _color),
    "crop": (2, _crop),
    "cutout": (2, _cutout),
    "flip": (1, _flip),
    "scale": (2, _scale),
    "rotate": (1, _rotate),
}
"""How many uniform numbers an operation takes for each image, and the parameters that they become."""
