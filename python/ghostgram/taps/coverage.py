"""Which parameters of a model the taps cover, and why the others are not."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghostgram.taps.embedding import embedding_forward
from ghostgram.taps.linear import conv1d_forward, linear_forward
from ghostgram.taps.norms import (
    gemma_norm_forward,
    group_norm_forward,
    instance_norm_forward,
    layer_norm_forward,
    llama_norm_forward,
    rms_norm_forward,
)
from ghostgram.taps.sharding import whole

Forward = Callable[..., Tensor]


class UncoveredParameterError(ValueError):
    """A trainable parameter has no tap; the message names it and says why."""


@dataclass(frozen=True)
class Row:
    """One trainable parameter in the coverage table."""

    name: str
    numel: int
    covered_by: str
    """The kind of layer that taps it, or "excluded"."""


@dataclass(frozen=True)
class Coverage:
    """What `cover` found."""

    rows: list[Row]
    scored: dict[str, nn.Parameter]
    """Parameters whose per-sample dots are taken, by name; a tied parameter under its first name."""
    excluded: dict[str, nn.Parameter]
    fallback: dict[str, nn.Parameter]
    """Parameters without a tap, whose dots must come from elsewhere."""
    tapped: list[tuple[nn.Module, Forward]]
    """Modules to tap, each with its tapped forward."""


def cover(
    model: nn.Module, parameters: Iterable[nn.Parameter], exclude: Sequence[str] = (), fallback: str = "error"
) -> Coverage:
    """Finds a tap for every parameter given, or raises an error that names those without one.

    Args:
        model: The model whose modules are looked at.
        parameters: The trainable parameters that must be covered.
        exclude: Names or shell patterns of parameters to leave out of the scores.
        fallback: "error" for parameters without a tap, or "jvp" to list them as `fallback`.

    Raises:
        UncoveredParameterError: Some parameter belongs to no layer with a tap.
        ValueError: A pattern of `exclude` matches nothing, or a parameter is not the model's.
    """
    wanted = set(parameters)
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        path = path.replace("_orig_mod.", "").removesuffix("_orig_mod")  # which torch.compile puts in
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in wanted:
                owners.setdefault(parameter, []).append((f"{path}.{name}" if path else name, module))
    if missing := len(wanted - owners.keys()):
        raise ValueError(f"parameters: {missing} of the optimizer's parameters do not belong to the model")
    for pattern in exclude:
        if not any(fnmatch.fnmatch(name, pattern) for uses in owners.values() for name, _ in uses):
            raise ValueError(f"exclude: {pattern!r} matches no trainable parameter")

    rows, scored, excluded, without, problems = [], {}, {}, {}, []
    forwards: dict[nn.Module, Forward] = {}
    for parameter, uses in owners.items():
        name = uses[0][0]
        if any(fnmatch.fnmatch(alias, pattern) for alias, _ in uses for pattern in exclude):
            excluded[name] = parameter
            rows.append(Row(name, parameter.numel(), "excluded"))
            continue
        found = [(alias, module, *tap_for(module)) for alias, module in uses]
        if missing_taps := [f"{alias} ({reason})" for alias, _, forward, reason in found if forward is None]:
            problems += missing_taps
            without[name] = parameter
            rows.append(Row(name, parameter.numel(), f"fallback: {missing_taps[0]}"))
            continue
        forwards |= {module: forward for _, module, forward, _ in found if forward is not None}
        scored[name] = parameter
        rows.append(Row(name, parameter.numel(), type(uses[0][1]).__name__))
    if problems and fallback == "error":
        raise UncoveredParameterError(
            "no tap covers these trainable parameters: " + "; ".join(problems) + ". Freeze them, or leave them out of "
            "the scores by name with exclude=[...]: their joint effect is then reported as `uncovered`; or, slower and "
            "exact, let forward-mode derivatives of the losses score them: fallback='jvp'"
        )
    return Coverage(rows, scored, excluded, without, list(forwards.items()))


def tap_for(module: nn.Module) -> tuple[Forward | None, str]:
    """The tapped forward of a module, or None and the reason. Subclasses count while they keep the forward."""
    if "forward" in vars(module):
        return None, f"the forward of this {type(module).__name__} has been replaced by something else"
    plain = type(module).forward
    if plain is nn.Linear.forward:
        return linear_forward, ""
    if plain is nn.Embedding.forward:
        return _embedding(module)
    if plain is nn.LayerNorm.forward:
        return layer_norm_forward, ""
    if plain is nn.RMSNorm.forward:
        return rms_norm_forward, ""
    if plain is nn.GroupNorm.forward:
        return group_norm_forward, ""
    if plain is nn.InstanceNorm2d.forward:  # which 1d and 3d share
        return instance_norm_forward, ""
    if any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).__mro__):
        return conv1d_forward, ""
    if type(module).__name__.endswith("RMSNorm"):
        return _written_out_norm(module)
    return None, f"{type(module).__name__} has no tap"


def _embedding(module: Any) -> tuple[Forward | None, str]:
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            return None, f"Embedding with {option} changes its gradients across samples"
    return embedding_forward, ""


def _written_out_norm(module: Any) -> tuple[Forward | None, str]:
    """Third-party RMSNorms are recognised by what they compute, not by their name: eps, casts and scale differ."""
    name = type(module).__name__
    parameters = dict(module.named_parameters())
    if parameters.keys() != {"weight"} or parameters["weight"].dim() != 1:
        return None, f"{name} has other parameters than one weight vector"
    if not hasattr(module, "variance_epsilon") and not hasattr(module, "eps"):
        return None, f"{name} has neither variance_epsilon nor eps"
    weight = whole(parameters["weight"])
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    with torch.no_grad():
        x = torch.linspace(-1.7, 2.3, 3 * weight.numel(), device=weight.device).view(1, 3, -1).to(weight.dtype)
        normalised = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + eps)
        module._parameters["weight"] = weight
        try:
            y = module.forward(x).double()  # not by a call, whose hooks may want to gather weights
        finally:
            module._parameters["weight"] = parameters["weight"]
        for forward, scale in ((llama_norm_forward, weight), (gemma_norm_forward, 1 + weight.double())):
            if torch.allclose(y, normalised * scale, rtol=1e-2 if weight.dtype.itemsize == 2 else 1e-5):
                return forward, ""
    return None, f"{name} is not the RMSNorm of Llama or of Gemma"
