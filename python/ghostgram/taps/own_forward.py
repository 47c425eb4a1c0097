"""Taps of small layers with a forward of their own: dots by the derivative of that forward along the directions.

For any layer y_i = f(w, x_i) whose samples do not see each other, <g_i, D> = <gradient at y_i, d/de f(w + e D, x_i)>.
So nothing needs to be known of f: norms of every dialect, gates, scales along any axis. It costs one more forward of
the layer for each of its parameters and directions, which for such layers is little.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils import _pytree

from ghostgram.taps.observed import observed
from ghostgram.taps.session import tap_of
from ghostgram.taps.sharding import whole
from ghostgram.taps.uses import by_row


class _Call(NamedTuple):
    """A call of a layer, without its tensors: they are put back in their order."""

    twin: nn.Module
    leaves: list[Any]
    where: list[int]
    tree: Any

    def __call__(self, parameters: Mapping[str, Tensor], tensors: list[Tensor]) -> Tensor:
        leaves = list(self.leaves)
        for place, tensor in zip(self.where, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = _pytree.tree_unflatten(leaves, self.tree)
        y: Tensor = functional_call(self.twin, dict(parameters), args, kwargs)
        return y


def _call(twin: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[_Call, list[Tensor]]:
    leaves, tree = _pytree.tree_flatten((args, dict(kwargs)))
    where = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[place] for place in where]
    return _Call(twin, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves], where, tree), tensors


def _twin(module: nn.Module) -> nn.Module:
    """The same layer, but one whose parameters can be swapped, and whose forward is replaced and watched by nobody."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    for hooks in [name for name in vars(twin) if name.endswith("_hooks")]:
        vars(twin)[hooks] = type(vars(twin)[hooks])()
    return twin


class OwnForward:
    """The tapped forward of one layer."""

    def __init__(self, module: nn.Module, by_position: bool) -> None:
        self.twin, self.by_position = _twin(module), by_position

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own forward, tapped."""
        tap, name = tap_of(module), type(module).__name__
        if tap.segments is not None and not self.by_position:
            raise ValueError(f"{name}: mixes positions, so that packed documents cannot be told apart: exclude it")
        call, tensors = _call(self.twin, args, kwargs)
        for x in tensors:
            if x.is_floating_point():
                tap.check_samples(x, name)
        parameters = dict(module.named_parameters(recurse=False))
        self.twin.training = module.training
        y = call({key: p if tap.gradients else p.detach() for key, p in parameters.items()}, tensors)
        if isinstance(module, nn.Embedding):
            y = _with_samples(y, tap.batch, name)
        if y.shape[0] != tap.batch:
            raise ValueError(
                f"{name}: expected an output whose first dimension is the sample ({tap.batch}), got {tuple(y.shape)}"
            )
        tap.note_dtype(y.dtype)
        for key in parameters:
            contract = partial(own_dots, call, list(parameters), key)
            y = observed(tap, tap.slot(key), y, contract, *(p.detach() for p in parameters.values()), *tensors)
        return y


def _with_samples(rows: Tensor, batch: int, name: str) -> Tensor:
    """Rows of an embedding; those of positions, (T, d) or (1, T, d), are the same for every sample and get its axis."""
    if rows.dim() == 2 and len(rows) == batch > 1:
        raise ValueError(
            f"{name}: rows {tuple(rows.shape)} may be one per sample or as many positions as there are samples; give "
            "its ids a sample axis"
        )
    if rows.dim() == 2:
        rows = rows.unsqueeze(0)
    return rows.expand(batch, *rows.shape[1:]) if len(rows) == 1 else rows


def own_dots(call: _Call, names: list[str], name: str, rows: int, segments: Tensor | None, *tensors: Tensor) -> Tensor:
    """(rows, K) dots of the gradient with the derivative along every direction, in the directions' dtype.

    Args:
        call: The layer's call.
        names: Its parameters.
        name: The one that the directions are of.
        rows: The rows of dots.
        segments: The document of each position, or None.
        tensors: The parameters, the call's tensors, the gradient at the output, the directions (K, *shape).
    """
    grad, D = tensors[-2:]
    wide = [x.to(D.dtype) if x.is_floating_point() else x for x in tensors[:-2]]
    parameters, inputs = dict(zip(names, wide, strict=False)), wide[len(names) :]
    padding = getattr(call.twin, "padding_idx", None)
    if padding is not None:  # a row that never gets a gradient
        D = D.index_fill(1, torch.tensor(padding, device=D.device), 0)

    def output(parameter: Tensor) -> Tensor:
        return call(parameters | {name: parameter}, inputs)

    dots = []
    for D_k in D:
        derivative = jvp(output, (parameters[name],), (D_k,))[1]
        products = grad * derivative
        dots.append(products.flatten(1).sum(1) if segments is None else products.flatten(0, 1).flatten(1).sum(1))
    return by_row(torch.stack(dots, 1), segments, rows)


def own_forward(module: nn.Module) -> OwnForward | str:
    """The tap of a layer that is found, by trying, to treat each sample by itself; or why there is none."""
    name = type(module).__name__
    if next((child for child in module.children() if next(child.parameters(), None) is not None), None) is not None:
        return f"{name} has no tap"
    why = f"{name} has no tap"
    twin = _twin(module)
    parameters: dict[str, Tensor] = {key: whole(p) for key, p in module.named_parameters(recurse=False)}
    for inputs in _inputs(module):
        twin._buffers = {key: None if b is None else b.clone() for key, b in module._buffers.items()}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                ys = [_call(twin, each, {})[0](parameters, list(each)) for each in (inputs, *_permuted(inputs))]
                for key, p in parameters.items():
                    own_dots(_call(twin, inputs, {})[0], list(parameters), key, 0, None, *parameters.values(), *inputs,
                             ys[0], p[None])  # fmt: skip
                if isinstance(module, nn.Embedding):
                    ys = [_with_samples(y, len(inputs[0]), name) for y in ys]
        except Exception:  # of any kind: it is somebody else's code, tried on inputs that it may not be made for
            continue
        y, other_samples, other_positions = ys
        if not isinstance(y, Tensor) or y.dim() < 2 or y.shape[0] != len(inputs[0]) or not bool(y.isfinite().all()):
            why = f"{name} has no tap, and does not turn a batch of inputs into a batch of numbers"
            continue
        if not torch.equal(y[0], other_samples[0]):
            return f"{name} has no tap, and its samples depend on each other or on chance"
        tried = dict(twin.named_buffers())
        if not all(torch.equal(tried[key], buffer) for key, buffer in module.named_buffers()):
            return f"{name} has no tap, and changes its buffers"
        by_position = y.shape[1] == inputs[0].shape[1] and torch.equal(y[:, 0], other_positions[:, 0])
        return OwnForward(module, by_position and y.dim() > 2)
    return why


def _permuted(inputs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """The same inputs with all samples but the first in another order, and with all positions but the first."""
    yield tuple(torch.cat([x[:1], x[1:].flip(0)]) for x in inputs)
    yield tuple(torch.cat([x[:, :1], x[:, 1:].flip(1)], 1) for x in inputs)


def _inputs(module: Any) -> Iterator[tuple[Tensor, ...]]:
    """Batches of three that a layer with these parameters may take."""
    weight = next(module.parameters(recurse=False))
    random = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Embedding):
        yield (torch.randint(module.num_embeddings, (3, 4), generator=random).to(weight.device),)
        return
    shapes: list[list[tuple[int, ...]]]
    if isinstance(module, nn.Bilinear):
        shapes = [[(3, 4, module.in1_features), (3, 4, module.in2_features)]]
    elif isinstance(module, nn.modules.conv._ConvNd):
        space = (d * k + s for d, k, s in zip(module.dilation, module.kernel_size, module.stride, strict=True))
        shapes = [[(3, module.in_channels, *space)]]
    else:  # features last, several axes last, or channels in front
        axes = weight.shape or (1,)
        shapes = [[(3, 4, axes[-1])], [(3, 4, *axes)], [(3, axes[0], 4, 5)], [(3, axes[0])]]
    for each in shapes:
        yield tuple(torch.randn(shape, generator=random).to(weight.device, weight.dtype) for shape in each)
