"""Which parameters the matching loss sees: all of them, deep ones, badly matched ones, or weights of one's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ghostgram.algorithms.pad.flat import Flat

Align = Literal["scalar", "tensor", "block"]
Share = Fraction | float | str


class Mask(Protocol):
    """Weights m >= 0 of the P scalars, in the numerator and in the denominator of the loss alike."""

    def weights(self, flat: Flat, student: Tensor, target: Tensor) -> int | Tensor | None:
        """The mask of one iteration, a constant for the gradient.

        Args:
            flat: The layout.
            student: (P,) where the student has arrived.
            target: (P,) where it should.

        Returns:
            What `gg.trajectory_match` takes: None for all, an int k for the scalars j >= k, or (P,) weights.

        Raises:
            ValueError: The mask does not fit the layout, or drops everything.
        """


def none() -> Mask:
    """All parameters count, as in MTT (arXiv 2203.11932) and DATM (arXiv 2310.05773)."""
    return _All()


def depth(alpha: Share, align: Align = "scalar") -> Mask:
    """Drops the first floor(alpha P) scalars, the shallow ones, as PAD does.

    Args:
        alpha: The share to drop, 0 <= alpha < 1, read as the decimal number that it prints as: .29 of 100 is 29.
        align: "scalar" cuts inside a tensor where the number falls. "tensor" drops whole tensors only, as many as the
            number allows, and "block" whole blocks: a filter or matrix with the vectors that follow it, such as its
            bias and norm. So never more is dropped than asked.

    Raises:
        ValueError: alpha or align is none of these.

    Source:
        PAD (arXiv 2408.03360), its parameter selection; the alignment is ours.
    """
    if align not in get_args(Align):
        raise ValueError(f"align: expected one of {get_args(Align)}, got {align!r}")
    return _Depth(_share(alpha), align)


def by_error(alpha: Share) -> Mask:
    """Drops the floor(alpha P) scalars of the smallest (student - target)^2 in every iteration, ties by flat number.

    Args:
        alpha: As in `depth`.

    Raises:
        ValueError: alpha is no share.

    Cost:
        A stable sort of P.

    Source:
        The "loss" variant that PAD (arXiv 2408.03360) compares its mask with.
    """
    return _ByError(_share(alpha))


def custom(chosen: Tensor | Sequence[str]) -> Mask:
    """One's own weights, or the parameters whose names match.

    Args:
        chosen: (P,) weights >= 0, bool or floating; or patterns such as "fc.*" of names to keep.

    Raises:
        ValueError: No pattern is given. Shapes and names are checked when the layout is known: every pattern must
            match a parameter.
    """
    if isinstance(chosen, Tensor):
        return _Weights(chosen)
    if isinstance(chosen, str) or not chosen:
        raise ValueError(f"chosen: expected (P,) weights or a list of patterns, got {chosen!r}")
    return _Named(tuple(chosen))


def _share(alpha: Share) -> Fraction:
    exact = Fraction(str(alpha))
    if not 0 <= exact < 1:
        raise ValueError(f"alpha: expected 0 <= alpha < 1, got {alpha}: 1 would drop everything")
    return exact


@dataclass(frozen=True)
class _All:
    def weights(self, flat: Flat, student: Tensor, target: Tensor) -> None:
        return None


@dataclass(frozen=True)
class _Depth:
    alpha: Fraction
    align: Align

    def weights(self, flat: Flat, student: Tensor, target: Tensor) -> int:
        asked = math.floor(self.alpha * flat.P)
        if self.align == "scalar":
            return asked
        starts = [
            offset
            for offset, shape in zip(flat.offsets, flat.shapes, strict=False)
            if self.align == "tensor" or len(shape) > 1
        ]
        return max((start for start in starts if start <= asked), default=0)


@dataclass(frozen=True)
class _ByError:
    alpha: Fraction

    def weights(self, flat: Flat, student: Tensor, target: Tensor) -> Tensor:
        # The order of absolute differences is that of their squares, which could underflow to ties.
        order = (student - target).detach().abs().argsort(stable=True)
        keep = torch.ones_like(order, dtype=torch.bool)
        keep[order[: math.floor(self.alpha * flat.P)]] = False
        return keep


@dataclass(frozen=True)
class _Weights:
    chosen: Tensor

    def weights(self, flat: Flat, student: Tensor, target: Tensor) -> Tensor:
        if self.chosen.shape != (flat.P,):
            raise ValueError(f"chosen: expected shape ({flat.P},), got {tuple(self.chosen.shape)}")
        wanted = torch.float64 if student.dtype == torch.float64 else torch.float32
        return self.chosen.detach().to(student.device, torch.bool if self.chosen.dtype == torch.bool else wanted)


@dataclass(frozen=True)
class _Named:
    patterns: tuple[str, ...]

    def weights(self, flat: Flat, student: Tensor, target: Tensor) -> Tensor:
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in flat.names):
                raise ValueError(f"chosen: expected every pattern to match one of {flat.names}, got {pattern!r}")
        kept = [any(fnmatchcase(name, pattern) for pattern in self.patterns) for name in flat.names]
        sizes = [shape.numel() for shape in flat.shapes]
        return torch.tensor(kept).repeat_interleave(torch.tensor(sizes)).to(student.device)
