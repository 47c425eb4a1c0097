"""The exact, slow truth: how every sample's loss changes along directions of the weights, by passes over the losses.

It knows nothing of layers: it moves the weights, or carries their tangents, through whatever the model computes.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from ghostgram.training.aside import random_states_kept
from ghostgram.training.gathered import gathered

Losses = Callable[[], Tensor]
Direction = Mapping[nn.Parameter, Tensor]

STEPS = {torch.float64: (1e-4, 1e-3, 1e-5), torch.float32: (1e-3, 4e-3, 3e-4)}
"""Lengths of a difference's step over the norm of the weights, in the order in which they are tried."""
AGREEMENT = 1e-3
"""By how much the differences of a step and of its half may differ, over the largest of any sample."""


def directional_derivatives(
    model: nn.Module, losses: Losses, directions: Mapping[nn.Parameter, Tensor], method: str = "jvp"
) -> Tensor:
    """Derivatives of per-sample losses along directions of the weights: out[i, k] = d/de l_i(w + e D_k) at e = 0.

    This is `<g_i, D_k>`, g_i being the gradient of l_i, for any architecture: tied and reused weights, bare
    parameters, operators that no tap knows. An embedding's row `padding_idx` does not count where it is looked up, as
    it does not in `.grad`. The model is run in the mode it is in. Weights, buffers, `.grad` and random states are left
    as found, and dropout draws the masks that the caller's random states give, the same for every direction.

    Args:
        model: Owns the parameters that move.
        losses: Runs the model and returns (B,), every sample's share of the training loss. Attention uses torch's
            math kernel under "jvp": no other one has a forward-mode rule. On a GPU, dropout inside attention has other
            masks there than in a fused kernel.
        directions: parameter -> (K, *shape), K the same for all. Other parameters stay where they are.
        method: "jvp": forward-mode tangents, exact to the rounding of the pass. "difference": central differences
            in place, by steps of `STEPS` times ||w|| / ||D_k||, extrapolated from a step and its half and accepted
            only where the two agree; for operators without forward-mode rule.

    Returns:
        (B, K) float64 on the CPU.

    Raises:
        ValueError: An argument is not as described, `losses()` returns no (B,) tensor, or "difference" is asked of
            16-bit weights, where the step would be rounded away.
        RuntimeError: An operator has no forward-mode rule; or no step's two differences agree.

    Cost:
        For every direction a forward pass with tangents ("jvp": 3 F, F being the FLOPs of one forward, and one copy of
        the moved parameters), or 4 to 12 forwards ("difference": 4 F to 12 F, one copy).

    Source:
        The identity is the definition of the gradient; forward-mode differentiation is torch.autograd.forward_ad's.
    """
    count = _checked(model, directions, method)
    derivative = _tangent if method == "jvp" else _difference
    columns = [derivative(model, losses, {p: d[k] for p, d in directions.items()}) for k in range(count)]
    return torch.stack(columns, 1)


def _checked(model: nn.Module, directions: Mapping[nn.Parameter, Tensor], method: str) -> int:
    """The number of directions."""
    if method not in ("jvp", "difference"):
        raise ValueError(f"method: expected 'jvp' or 'difference', got {method!r}")
    names = {p: name for name, p in model.named_parameters()}
    if not directions:
        raise ValueError("directions: expected at least one parameter, got none")
    count = next(iter(directions.values())).shape[:1]
    for p, d in directions.items():
        if p not in names:
            raise ValueError(f"directions: a parameter of shape {tuple(p.shape)} does not belong to the model")
        if not count or d.shape != (*count, *p.shape):
            expected = ", ".join(map(str, ("K" if not count else count[0], *p.shape)))
            raise ValueError(f"directions[{names[p]}]: expected shape ({expected}), got {tuple(d.shape)}")
        if method == "difference" and p.dtype not in STEPS:
            raise ValueError(
                f"method='difference': expected float32 or float64 weights, got {names[p]} in {p.dtype}, which would "
                "round the step away; use method='jvp'"
            )
    return count[0]


def _tangent(model: nn.Module, losses: Losses, direction: Direction) -> Tensor:
    """(B,) by one pass over dual numbers."""
    largest = max(float(d.abs().max()) if d.numel() else 0.0 for d in direction.values())
    scale = 2.0 ** math.frexp(largest)[1]  # tangents near 1: a 16-bit one would underflow
    with _undisturbed(model), _forward_mode(model):

        @functools.cache  # tied weights stay one tensor
        def dual(p: nn.Parameter, padding: int | None) -> Tensor:
            tangent = (direction[p] / scale).to(p.dtype)
            if padding is not None:
                tangent[padding] = 0
            return forward_ad.make_dual(p.detach(), tangent)  # type: ignore[no-any-return, no-untyped-call]

        with _placed([(use, dual(use.parameter, use.padding)) for use in _uses(model, direction)]):
            try:
                values = per_sample(losses())
            except RuntimeError as error:
                if "forward AD" not in str(error) and "forward mode AD" not in str(error):
                    raise
                raise RuntimeError(
                    f"{error}\nSome operator of the losses has no forward-mode rule: use method='difference'"
                ) from error
        tangents = forward_ad.unpack_dual(values).tangent  # type: ignore[no-untyped-call]
        return (torch.zeros_like(values) if tangents is None else tangents).cpu().double() * scale


def _difference(model: nn.Module, losses: Losses, direction: Direction) -> Tensor:
    """(B,) by central differences, at the first step that agrees with its half."""
    tried = []
    for relative in STEPS[torch.float32 if any(p.dtype == torch.float32 for p in direction) else torch.float64]:
        coarse, fine = (central_difference(model, losses, direction, e)[0] for e in (relative, relative / 2))
        apart, largest = float((coarse - fine).abs().max()), float(fine.abs().max())
        if apart <= AGREEMENT * largest:
            return (4 * fine - coarse) / 3
        tried.append(f"{apart:.2g} of {largest:.2g} at {relative:g} ||w||")
    raise RuntimeError(
        f"no difference agrees with that at half its step: they are apart by {', '.join(tried)}; the losses are not "
        "smooth or not exact enough (16-bit autocast? an operator that gives other bits each time?)"
    )


def central_difference(
    model: nn.Module, losses: Losses, direction: Direction, relative: float
) -> tuple[Tensor, Tensor]:
    """Per-sample losses on both sides of the weights: their slope along a direction, and their mean.

    Args:
        model: As for `directional_derivatives`.
        losses: As there.
        direction: parameter -> D of its shape.
        relative: The step in units of ||w|| / ||D||, both over the parameters of `direction`. Errors are of its square,
            and of the losses' rounding over it; nothing checks them here.

    Returns:
        (B,) `(l(w + e D) - l(w - e D)) / 2 e` and (B,) `(l(w + e D) + l(w - e D)) / 2`, float64 on the CPU.

    Cost:
        Two forwards and one copy of the moved parameters.
    """
    weights = [p.detach() for p in direction]
    kept = {p: p.detach().clone() for p in direction}
    along = [d.to(p.dtype) for p, d in direction.items()]
    size, length = (float(gathered(torch._foreach_norm(each)).norm()) for each in (weights, along))
    size = size or 0.02 * math.sqrt(sum(w.numel() for w in weights))  # all zero: as if just initialised
    step = relative * size / length if length else 0.0

    def losses_at(step: float) -> Tensor:
        with _undisturbed(model):
            try:
                torch._foreach_add_(weights, along, alpha=step)
                looked_up = [use for use in _uses(model, direction) if use.padding is not None]
                with _placed([(use, _padding_back(use, kept)) for use in looked_up]):
                    return per_sample(losses()).cpu().double()
            finally:
                torch._foreach_copy_(weights, list(kept.values()))

    ahead, behind = losses_at(step), losses_at(-step)
    return (ahead - behind) / (2 * step or 1.0), (ahead + behind) / 2


# What both stand on. -------------------------------------------------------------------------------------------------


class _Use(NamedTuple):
    """One place where a module holds a parameter; a tied one has several."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    padding: int | None
    """The row of an embedding's table whose look-up has no gradient."""


def _uses(model: nn.Module, direction: Direction) -> list[_Use]:
    found = []
    for module in model.modules():
        padding = module.padding_idx if isinstance(module, nn.Embedding) else None
        mine = [(name, p) for name, p in module._parameters.items() if p is not None and p in direction]
        found += [_Use(module, name, p, padding) for name, p in mine]
    return found


def _padding_back(use: _Use, kept: Direction) -> Tensor:
    """A copy of a moved table in which the row that has no gradient is where it was."""
    table = use.parameter.detach().clone()
    table[use.padding] = kept[use.parameter][use.padding]
    return table


@contextmanager
def _placed(tensors: list[tuple[_Use, Tensor]]) -> Iterator[None]:
    """Other tensors in the place of parameters."""
    try:
        for use, tensor in tensors:
            use.module._parameters[use.name] = tensor  # type: ignore[assignment]
        yield
    finally:
        for use, _ in tensors:
            use.module._parameters[use.name] = use.parameter


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """No reverse mode and no compiled code inside; random states and buffers outside as before.

    Autocast must not cache: it would go on with casts of weights that have moved.
    """
    buffers = [
        (m, name, b, b._version, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None
    ]
    cached = torch.is_autocast_cache_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(random_states_kept(model))
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            for module, name, buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)
                module._buffers[name] = buffer


@contextmanager
def _forward_mode(model: nn.Module) -> Iterator[None]:
    """A dual level in which operators are chosen that have a forward-mode rule.

    Reentrant checkpoints become plain calls: weights are none of their inputs, and their tangents would silently end
    there. Fused kernels give way to what they fuse: recurrent layers, torch's encoder layers, weight normalisation,
    grouped products of transformers' experts.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    with ExitStack() as stack:
        stack.callback(delattr, CheckpointFunction, "apply")  # the inherited one is back
        CheckpointFunction.apply = lambda function, _, *args: function(*args)  # type: ignore[method-assign]
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(_replaced(torch, "_weight_norm", _weight_norm))
        if recurrent:
            stack.enter_context(_replaced(torch.backends.mkldnn, "enabled", False))
        for config in configs.values():
            if hasattr(config, "_experts_implementation"):
                stack.enter_context(_replaced(config, "_experts_implementation", "eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(forward_ad.dual_level())
        stack.enter_context(_TangentsLikePrimals())
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    try:
        setattr(owner, name, value)
        yield
    finally:
        setattr(owner, name, before)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


class _TangentsLikePrimals(TorchFunctionMode):
    """Rounds a 16-bit result's tangent like the result: norms under a CPU's autocast leave it in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype.itemsize == 2:
            primal, tangent = forward_ad.unpack_dual(result)  # type: ignore[no-untyped-call]
            if tangent is not None and tangent.dtype != primal.dtype:
                return forward_ad.make_dual(primal, tangent.to(primal.dtype))  # type: ignore[no-untyped-call]
        return result


def per_sample(losses: object) -> Tensor:
    """What `losses()` returned, if it is one number for every sample."""
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        what = f"{losses.dtype} of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"losses(): expected a floating-point (B,) tensor, every sample's share of the loss, got {what}"
        )
    return losses
