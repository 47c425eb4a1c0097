"""A student as a stack of known layers, and the second-order pass through it in closed form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ghostgram.algorithms.pad import layers
from ghostgram.algorithms.pad.convnet import ConvNet, Halving
from ghostgram.algorithms.pad.flat import Flat

_KINDS: dict[type[nn.Module], type[layers.Layer]] = {
    Halving: layers.Halving,
    nn.AvgPool2d: layers.AvgPool2d,
    nn.Conv2d: layers.Conv2d,
    nn.Flatten: layers.Flatten,
    nn.GroupNorm: layers.GroupNorm,
    nn.Linear: layers.Linear,
    nn.ReLU: layers.ReLU,
}


class UnknownLayer(ValueError):
    """A student has a layer, or a use of it, that has no closed form here."""


class Stack:
    """A student of known layers, one after the other.

    Args:
        flat: The student: a ConvNet or an nn.Sequential, of AvgPool2d, Conv2d, Flatten, GroupNorm, Linear and ReLU.

    Raises:
        UnknownLayer: It has other layers, or hooks, shared or frozen parameters.
    """

    def __init__(self, flat: Flat) -> None:
        self._flat = flat
        self._parts = list(_parts("", flat.module))
        found = [name for name, part in self._parts for name in _names(name, part)]
        if found != list(flat.names):
            raise UnknownLayer(f"expected every layer's parameters once and trainable, got {flat.names} for {found}")

    def derived(self, theta: Tensor, direction: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The derivative s of the mean cross-entropy along a direction of the weights, and the derivatives of s.

        Args:
            theta: (P,) weights.
            direction: (P,) d.
            x: (n, ...) augmented images.
            labels: (n, classes) logits of soft labels, or (n,) classes.

        Returns:
            s, and its derivatives by name: "theta" (P,), "images" like x, and for soft labels "labels".

        Cost:
            8 forward passes' worth of products, where a double backward has 9: the gradient itself is not formed.
            Memory: 5 to 6 values for each of the student's own, no graph.
        """
        weights, moves = self._flat.views(theta), self._flat.views(direction)
        passes = [
            _KINDS[type(part)](part, *([given[n] for n in _names(name, part)] for given in (weights, moves)))
            for name, part in self._parts
        ]
        value: layers.Value = (x.contiguous(), None)
        for layer in passes:
            value = layer.forward(*value)
        z, dz = value
        assert dz is not None  # a flat vector has weights
        s, gradient, by = _cross_entropy(z, dz, labels)
        found: list[Tensor] = []
        while passes:  # a layer's values are let go as soon as it is passed
            layer = passes.pop()
            gradient = layer.backward(*gradient)
            found = layer.found + found
        by_theta = torch.cat([u.reshape(-1) for u in found])
        return s, by | {"theta": by_theta, "images": gradient[1]}


def _cross_entropy(z: Tensor, dz: Tensor, labels: Tensor) -> tuple[Tensor, layers.Gradient, dict[str, Tensor]]:
    """Of the mean cross-entropy: its derivative s, its gradient by logits, and the derivative of s by soft labels."""
    soft = labels.is_floating_point()
    targets = labels.softmax(1) if soft else nn.functional.one_hot(labels, z.shape[1]).to(z.dtype)
    p = z.softmax(1)
    dlog = dz - (p * dz).sum(1, keepdim=True)  # of log p
    g, dg = (p - targets) / len(z), p * dlog / len(z)
    s = (g * dz).sum()
    if not soft:
        return s, (g, dg), {}
    return s, (g, dg), {"labels": -targets * (dlog - (targets * dlog).sum(1, keepdim=True)) / len(z)}


def _parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers by name, in the order of the forward."""
    prefix = f"{name}." if name else ""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise UnknownLayer(f"{name!r} has hooks")
    if type(module) is nn.Sequential:
        for own, child in module.named_children():
            yield from _parts(prefix + own, child)
    elif type(module) is ConvNet:
        yield from _parts(f"{prefix}blocks", module.blocks)
        yield "", nn.Flatten()
        yield from _parts(f"{prefix}fc", module.fc)
    elif type(module) in _KINDS and _is_plain(module):
        yield name, module
    else:
        raise UnknownLayer(f"{name!r}, {module}, has no closed form here")


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer is used as its closed form has it."""
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    return not isinstance(module, nn.GroupNorm) or module.affine


def _names(name: str, part: nn.Module) -> list[str]:
    return [f"{name}.{own}" if name else own for own, _ in part.named_parameters()]
