"""A model's trainable parameters as one vector, and its logits as a function of that vector."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Flat:
    """The layout of a model's trainable scalars in one vector theta of P, in the order of `named_parameters()`.

    The model itself gives the function only: theta is an argument, so weights of many steps or of many experts need no
    model of their own. A parameter used in several places counts once; one that requires no gradient stays in the
    model, as it is, and so do buffers.

    Args:
        module: Takes images and returns logits (n, classes), in the mode (train or eval) that it is left in. Its
            trainable parameters share a dtype and a device.

    Attributes:
        names: Of the parameters, in order.
        shapes: Theirs.
        offsets: Where each begins in theta, and P at the end.
        P: How many scalars there are.

    Raises:
        ValueError: Nothing is trainable, or dtypes or devices differ.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = _trainable(module)
        if not parameters:
            raise ValueError("module: expected at least one trainable parameter, got none")
        kinds = {(p.dtype, p.device) for p in parameters.values()}
        if len(kinds) > 1:
            raise ValueError(f"module: expected parameters of one dtype on one device, got {sorted(map(str, kinds))}")
        self.names = tuple(parameters)
        self.shapes = tuple(p.shape for p in parameters.values())
        self._sizes = [p.numel() for p in parameters.values()]
        self.offsets = (0, *accumulate(self._sizes))
        self.P = self.offsets[-1]
        self.module = module
        # Forwards see copies, so that one which writes to buffers is found out before the model is changed.
        self._buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        self._keeps_buffers = not self._buffers

    def vector(self, module: nn.Module) -> Tensor:
        """(P,) a copy of the weights of a model of this layout, without a graph.

        Raises:
            ValueError: The model has other parameters.
        """
        return torch.cat([p.detach().reshape(-1) for p in self._own(module)])

    def views(self, theta: Tensor) -> dict[str, Tensor]:
        """The parts of theta by parameter, in its memory and, where it has one, in its graph.

        Raises:
            ValueError: theta is not (P,).
        """
        if theta.shape != (self.P,):
            raise ValueError(f"theta: expected shape ({self.P},), got {tuple(theta.shape)}")
        # One node, whose backward writes P scalars once; slices would write P for each of them.
        parts = torch.split(theta, self._sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def logits(self, theta: Tensor, x: Tensor) -> Tensor:
        """What the model returns for x with theta as its weights: differentiable by both, and fit for `vmap`.

        Raises:
            ValueError: theta is not (P,), or the forward changes a buffer, as BatchNorm does to its running statistics
                in training mode: then the logits depend on more than theta and x. The model keeps its buffers.
        """
        logits: Tensor = functional_call(self.module, {**self.views(theta), **self._buffers}, (x,))
        if not self._keeps_buffers:
            self._check_buffers()
        return logits

    def load(self, module: nn.Module, theta: Tensor) -> None:
        """Copies theta into the weights of a model of this layout.

        Raises:
            ValueError: theta is not (P,), or the model has other parameters; nothing is written then.
        """
        own, views = self._own(module), self.views(theta)
        with torch.no_grad():
            for parameter, view in zip(own, views.values(), strict=True):
                parameter.copy_(view)

    def _check_buffers(self) -> None:
        """Compares values: not every kernel that writes to a buffer tells autograd."""
        for name, buffer in self.module.named_buffers():
            before, after = (x.detach().reshape(-1).view(torch.uint8) for x in (buffer, self._buffers[name]))
            if not torch.equal(before, after):
                raise ValueError(
                    f"module: expected a forward that changes no buffer, got one that changes {name!r}: use a norm "
                    "without running statistics, such as GroupNorm, or eval mode"
                )
        self._keeps_buffers = True

    def _own(self, module: nn.Module) -> list[nn.Parameter]:
        parameters = _trainable(module)
        expected = dict(zip(self.names, map(tuple, self.shapes), strict=True))
        got = {name: tuple(p.shape) for name, p in parameters.items()}
        if list(got.items()) != list(expected.items()):
            raise ValueError(f"module: expected the trainable parameters {expected}, in this order, got {got}")
        return list(parameters.values())


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
