"""The second-order pass of one inner step, in three forms that agree to rounding."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ghostgram.algorithms.pad.flat import Flat
from ghostgram.algorithms.pad.inner import Inner, Piece
from ghostgram.algorithms.pad.stack import Stack, UnknownLayer

Second = Literal["auto", "layers", "double_backward", "jvp"]

Form = Callable[[Inner, int, Piece, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(loop, step, piece, theta (P,), direction (P,)) -> s and its derivatives by "images", "labels" and "theta".

s is the derivative of the piece's loss along the direction of the weights.
"""


def form_of(second: Second, flat: Flat) -> Form:
    """The form of this name; "auto" is "layers" where these are known, and says so where they are not.

    Raises:
        ValueError: "layers" was asked for, and some layer is unknown.
    """
    if second in ("double_backward", "jvp"):
        return double_backward if second == "double_backward" else jvp
    try:
        return _Layers(Stack(flat))
    except UnknownLayer as unknown:
        if second == "layers":
            raise ValueError(
                f"second: expected 'double_backward' or 'jvp' for this student, got 'layers': {unknown}"
            ) from unknown
        warnings.warn(f"second: 'double_backward' takes over from 'layers', which is faster: {unknown}", stacklevel=3)
        return double_backward


def double_backward(
    inner: Inner, step: int, piece: Piece, theta: Tensor, direction: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """A backward through the gradient's own graph."""
    weights, leaves = theta.detach().requires_grad_(), _leaves(inner, piece)
    loss = inner.loss(weights, step, piece, leaves["images"], leaves.get("labels", inner.labels[piece.indices]))
    s = torch.autograd.grad(loss, weights, create_graph=True)[0] @ direction
    return _backward(s, leaves | {"theta": weights})


def jvp(inner: Inner, step: int, piece: Piece, theta: Tensor, direction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A backward through a forward-mode derivative of the loss."""
    weights, leaves = theta.detach().requires_grad_(), _leaves(inner, piece)
    with forward_ad.dual_level():
        moving = forward_ad.make_dual(weights, direction)  # type: ignore[no-untyped-call]
        dual = inner.logits(moving, step, piece, leaves["images"])
        logits = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
        labels = leaves.get("labels", inner.labels[piece.indices])
        s = inner.slope(logits.primal, logits.tangent, piece, labels)
    return _backward(s, leaves | {"theta": weights})


class _Layers:
    """Closed forms of layers, and a backward through the augmentation."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    def __call__(
        self, inner: Inner, step: int, piece: Piece, theta: Tensor, direction: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = inner.images[piece.indices].requires_grad_()
        seen = inner.problem.augment(step, images, piece.indices)
        with torch.no_grad():
            s, by = self._stack.derived(theta, direction, seen.detach(), inner.labels[piece.indices])
            by["images"] = torch.autograd.grad(seen, images, by["images"])[0]
            return piece.share * s, {name: piece.share * u for name, u in by.items()}


def _leaves(inner: Inner, piece: Piece) -> dict[str, Tensor]:
    return {name: x[piece.indices].requires_grad_() for name, x in inner.learned.items()}


def _backward(s: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    derivatives = torch.autograd.grad(s, list(leaves.values()), materialize_grads=True)
    return s.detach(), dict(zip(leaves, derivatives, strict=True))
