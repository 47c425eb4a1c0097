"""The step that experts are trained with: adaptive GSAM on flat weights, many experts at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

LARGEST_RHO = 0.5
"""A larger radius is warned of: weights that are moved by as much as that say little about those trained."""


def check_gsam(rho: float, alpha: float) -> None:
    """Refuses a radius or a share that no step can be taken with, and warns of a radius that trains nonsense.

    Raises:
        ValueError: `rho` or `alpha` is negative or not finite.
    """
    for name, value in (("rho", rho), ("alpha", alpha)):
        if isinstance(value, bool) or not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number, 0 at least, got {value!r}")
    if rho > LARGEST_RHO:
        warnings.warn(f"rho: {rho} is more than {LARGEST_RHO}; published experts have 0.01", stacklevel=3)


def gsam_step(
    weights: Tensor, gradient: Callable[[Tensor], Tensor], lr: float, rho: float = 0.01, alpha: float = 0.3
) -> Tensor:
    """The weights after one step of adaptive, surrogate-gap guided, sharpness-aware minimisation.

    With g the gradient at w, and every norm and product over the last dimension alone,

        e   = rho w^2 g / (|| |w| g || + 1e-12)
        g'  = the gradient at w + e
        g'' = g' - alpha (g - <g, g'> / ||g'||^2 g')
        w  <- w - lr g''

    alpha 0 is adaptive SAM. rho 0 is plain SGD, of one gradient, whatever alpha is: e is 0 there, and the difference 0.
    Where g' is 0 it has no direction, and its share of g is taken as 0.

    Args:
        weights: (..., P), each row a model of its own.
        gradient: From weights to their gradients, of the same shape; called twice, once if rho is 0. Both calls have to
            see the same data.
        lr: The learning rate.
        rho: The radius, in units of the weights themselves.
        alpha: The share of g across g' that is taken off.

    Returns:
        A new tensor of the shape and dtype of `weights`.

    Cost:
        Two gradients, and about 18 P operations over 80 P bytes of float32.

    Source:
        Kwon et al., "ASAM" (arXiv 2102.11600) for e; Zhuang et al., "Surrogate gap minimization improves
        sharpness-aware training" (arXiv 2203.08065) for g''.
    """
    first = gradient(weights)
    if rho == 0:
        return weights - lr * first
    length = (weights * first).norm(dim=-1, keepdim=True)
    second = gradient(weights + weights.square() * first * (rho / (length + 1e-12)))
    if alpha:
        square = second.square().sum(dim=-1, keepdim=True).clamp(min=torch.finfo(second.dtype).tiny)
        along = (first * second).sum(dim=-1, keepdim=True) / square
        second = second - alpha * (first - along * second)
    return weights - lr * second
