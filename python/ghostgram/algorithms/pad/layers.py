"""Layers that know how their gradients change as the weights move: closed forms, where autograd builds a second graph.

A pass carries pairs, forwards a value x and backwards a gradient g, each with its derivative dx or dg along a direction
of the weights. Below the first weights a value does not move, so dx is None there, and the gradient itself is not
needed, so g is None there too; dg is needed everywhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten

Value = tuple[Tensor, Tensor | None]
Gradient = tuple[Tensor | None, Tensor]


class Layer(ABC):
    """One pass through a layer.

    Args:
        module: The layer.
        weights: Its parameters, in their order.
        moves: How each moves.
    """

    def __init__(self, module: Any, weights: list[Tensor], moves: list[Tensor]) -> None:
        self.module = module
        self.weights, self.moves = weights, moves
        self.found: list[Tensor] = []  # after the way back: the derivative of the gradient by each parameter

    @abstractmethod
    def forward(self, x: Tensor, dx: Tensor | None) -> Value:
        """The output and its derivative."""

    @abstractmethod
    def backward(self, g: Tensor | None, dg: Tensor) -> Gradient:
        """The gradient by the input and its derivative, from those by the output."""


class _WithoutWeights(Layer):
    """A layer that treats derivatives as it treats values, being linear; of its input only the shape is used."""

    def forward(self, x: Tensor, dx: Tensor | None) -> Value:
        """One pass, or two."""
        self.x = x
        return self.module(x), None if dx is None else self.module(dx)

    def backward(self, g: Tensor | None, dg: Tensor) -> Gradient:
        """One pass, or two."""
        return None if g is None else self._back(g), self._back(dg)

    @abstractmethod
    def _back(self, g: Tensor) -> Tensor:
        """The gradient by the input."""


class Flatten(_WithoutWeights):
    """(n, ...) -> (n, features)."""

    def _back(self, g: Tensor) -> Tensor:
        return g.view(self.x.shape)


class AvgPool2d(_WithoutWeights):
    """Means of windows."""

    def _back(self, g: Tensor) -> Tensor:
        pool = self.module
        geometry = [[n, n] if isinstance(n, int) else n for n in (pool.kernel_size, pool.stride, pool.padding)]
        options = (pool.ceil_mode, pool.count_include_pad, pool.divisor_override)
        below: Tensor = aten.avg_pool2d_backward(g, self.x, *geometry, *options)
        return below


class Halving(_WithoutWeights):
    """Means of 2x2 pixels."""

    def _back(self, g: Tensor) -> Tensor:
        below: Tensor = self.module.transposed(g, self.x)
        return below


class ReLU(_WithoutWeights):
    """max(x, 0), its derivative 0 at 0."""

    def forward(self, x: Tensor, dx: Tensor | None) -> Value:
        """The output says where it is linear, and is kept for it."""
        self.y = self.module(x)
        return self.y, None if dx is None else self._back(dx)

    def _back(self, g: Tensor) -> Tensor:
        below: Tensor = aten.threshold_backward(g, self.y, 0)
        return below


class _Bilinear(Layer):
    """A product of input and weight, linear in each, and a bias."""

    def forward(self, x: Tensor, dx: Tensor | None) -> Value:
        """With dy = W(dx) + dW(x) + db."""
        self.x, self.dx = x, dx
        dy = self._product(x, *self.moves)
        return self._product(x, *self.weights), dy if dx is None else dy.add_(self._product(dx, self.weights[0]))

    def backward(self, g: Tensor | None, dg: Tensor) -> Gradient:
        """By the product rule, as on the way forward."""
        assert g is not None  # there are weights here
        (weight, *_), (moves, *_) = self.weights, self.moves
        by_weight = self._by_weight(dg, self.x)
        if self.dx is not None:
            by_weight = by_weight + self._by_weight(g, self.dx)
        self.found = [by_weight, dg.transpose(0, 1).flatten(1).sum(1)][: len(self.weights)]
        below = None if self.dx is None else self._by_input(g, weight)
        return below, self._by_input(dg, weight).add_(self._by_input(g, moves))

    @abstractmethod
    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output."""

    @abstractmethod
    def _by_input(self, g: Tensor, weight: Tensor) -> Tensor:
        """The gradient by the input, for this weight."""

    @abstractmethod
    def _by_weight(self, g: Tensor, x: Tensor) -> Tensor:
        """The gradient by the weight, for this input."""


class Linear(_Bilinear):
    """x W^T + b of (n, features)."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight, bias)

    def _by_input(self, g: Tensor, weight: Tensor) -> Tensor:
        return g @ weight

    def _by_weight(self, g: Tensor, x: Tensor) -> Tensor:
        return g.T @ x


class Conv2d(_Bilinear):
    """A convolution."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        conv = self.module
        return functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def _by_input(self, g: Tensor, weight: Tensor) -> Tensor:
        return self._gradient(g, self.x, weight, 0)

    def _by_weight(self, g: Tensor, x: Tensor) -> Tensor:
        return self._gradient(g, x, self.weights[0], 1)

    def _gradient(self, g: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
        conv, zero = self.module, [0, 0]
        wanted = [which == i for i in range(3)]
        geometry = (conv.stride, conv.padding, conv.dilation, False, zero, conv.groups)
        found: Tensor = aten.convolution_backward(g, x, weight, None, *geometry, wanted)[which]
        return found


class GroupNorm(Layer):
    """gamma x^ + beta, with x^ = r (x - mean) over each group of each sample, r = 1 / sqrt(var + eps).

    The Jacobian of x^ by x is symmetric, J = r (1 - 1 1^T / K - x^ x^T / K) for a group of K scalars. So dx^ = J dx
    comes from the kernel of the backward, and with h = gamma g

        d(J h) = J dh - r (mean(x^ dx) J h + mean(x^ h) dx^ + mean(dx^ h) x^).
    """

    def forward(self, x: Tensor, dx: Tensor | None) -> Value:
        """With dy = dbeta + gamma dx^ + dgamma x^."""
        self.x = x
        n, channels = x.shape[:2]
        self._sizes = (n, channels, math.prod(x.shape[2:]), self.module.num_groups)
        self.normed, self._mean, self._r = aten.native_group_norm(x, None, None, *self._sizes, self.module.eps)
        dx = torch.zeros_like(x) if dx is None else dx
        self.dnormed = self._jacobian(dx)
        self._slope = self._by_group(self._by_channel(self.normed, dx))
        gamma, beta, dgamma, dbeta = (self._per_channel(w) for w in (*self.weights, *self.moves))
        dy = torch.addcmul(dbeta, self.dnormed, gamma).addcmul_(self.normed, dgamma)
        return torch.addcmul(beta, self.normed, gamma), dy

    def backward(self, g: Tensor | None, dg: Tensor) -> Gradient:
        """J h and its derivative."""
        assert g is not None  # there are weights here
        gamma, dgamma = self.weights[0], self.moves[0]
        by_gamma, moved = self._by_channel(g, self.normed), self._by_channel(g, self.dnormed)
        self.found = [(self._by_channel(dg, self.normed) + moved).sum(0), dg.sum([0, *range(2, dg.ndim)])]
        below = self._jacobian(g * self._per_channel(gamma))
        dh = (dg * self._per_channel(gamma)).addcmul_(g, self._per_channel(dgamma))
        dbelow = self._jacobian(dh)
        for mean, values in (
            (self._slope, below),
            (self._by_group(by_gamma * gamma), self.dnormed),
            (self._by_group(moved * gamma), self.normed),
        ):
            self._grouped(dbelow).addcmul_(self._grouped(values), (-self._r * mean)[:, :, None])
        return below, dbelow

    def _jacobian(self, t: Tensor) -> Tensor:
        """J t."""
        kernel, wanted = aten.native_group_norm_backward, [True, False, False]
        product: Tensor = kernel(t, self.x, self._mean, self._r, None, *self._sizes, wanted)[0]
        return product

    def _by_channel(self, t: Tensor, u: Tensor) -> Tensor:
        """(n, channels): the products summed over places."""
        return (t * u).view(*self._sizes[:2], -1).sum(2)

    def _by_group(self, sums: Tensor) -> Tensor:
        """(n, groups): the means over groups of what was summed by channel."""
        n, channels, places, groups = self._sizes
        means: Tensor = sums.view(n, groups, -1).sum(2) / (channels // groups * places)
        return means

    def _grouped(self, t: Tensor) -> Tensor:
        """(n, groups, K), in the memory of t."""
        return t.view(self._sizes[0], self._sizes[3], -1)

    def _per_channel(self, w: Tensor) -> Tensor:
        return w.view(-1, *[1] * (self.x.ndim - 2))
