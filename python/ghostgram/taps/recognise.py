"""Which layers have a tap: torch's own by their forward, which subclasses must keep; others by what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ghostgram.taps.attention import attention_forward
from ghostgram.taps.conv import conv_forward, conv_transpose_forward
from ghostgram.taps.embedding import embedding_forward
from ghostgram.taps.linear import conv1d_forward, linear_forward
from ghostgram.taps.norms import (
    gemma_norm_forward,
    group_norm_forward,
    instance_norm_forward,
    layer_norm_forward,
    llama_norm_forward,
    rms_norm_forward,
    root_mean_square_normalised,
    written_out_eps,
)
from ghostgram.taps.observed import bag_forward
from ghostgram.taps.own_forward import own_forward
from ghostgram.taps.sharding import whole

Forward = Callable[..., Any]


class Tapped(NamedTuple):
    """How a layer is tapped."""

    forward: Forward
    parameters: tuple[str, ...] = ("weight", "bias")
    """The names of the parameters that it scores."""


ATTENTION = (
    *("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v"),
    *("out_proj.weight", "out_proj.bias"),  # which attention reads without calling out_proj
)

BY_FORWARD: dict[Any, Tapped] = {
    nn.Linear.forward: Tapped(linear_forward),
    nn.Conv1d.forward: Tapped(conv_forward),
    nn.Conv2d.forward: Tapped(conv_forward),
    nn.Conv3d.forward: Tapped(conv_forward),
    nn.ConvTranspose1d.forward: Tapped(conv_transpose_forward),
    nn.ConvTranspose2d.forward: Tapped(conv_transpose_forward),
    nn.ConvTranspose3d.forward: Tapped(conv_transpose_forward),
    nn.LayerNorm.forward: Tapped(layer_norm_forward),
    nn.RMSNorm.forward: Tapped(rms_norm_forward),
    nn.GroupNorm.forward: Tapped(group_norm_forward),
    nn.InstanceNorm2d.forward: Tapped(instance_norm_forward),  # which 1d and 3d share
    nn.Embedding.forward: Tapped(embedding_forward),
    nn.EmbeddingBag.forward: Tapped(bag_forward),
    nn.MultiheadAttention.forward: Tapped(attention_forward, ATTENTION),
}


CONVOLUTIONS = [kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)]


def tap_for(module: nn.Module) -> Tapped | str:
    """The tap of a module, or the reason why it has none."""
    kind = type(module)
    if "forward" in vars(module):
        return f"the forward of this {kind.__name__} has been replaced by something else"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (reason := _couples_samples(module)):
        return reason
    if kind.forward in BY_FORWARD and getattr(kind, "_conv_forward", None) in (None, *CONVOLUTIONS):
        return BY_FORWARD[kind.forward]
    if any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers.") for base in kind.__mro__):
        return Tapped(conv1d_forward)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return f"{kind.__name__} normalises over the samples of a batch: use another norm"
    if forward := _written_out_norm(module):
        return Tapped(forward)
    own = own_forward(module)
    return own if isinstance(own, str) else Tapped(own, tuple(name for name, _ in module.named_parameters()))


def _couples_samples(module: Any) -> str | None:
    """Why the table of an embedding has gradients that are no sum over samples, if it has."""
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            return f"{type(module).__name__} with {option} changes its gradients across samples"
    if getattr(module, "mode", None) == "max":
        return "EmbeddingBag with mode='max' is not linear in its table"
    return None


def _written_out_norm(module: Any) -> Forward | None:
    """Third-party RMSNorms are recognised by what they compute, not by their name: eps, casts and scale differ."""
    parameters = dict(module.named_parameters())
    eps = written_out_eps(module)
    if parameters.keys() != {"weight"} or parameters["weight"].dim() != 1 or not isinstance(eps, float):
        return None
    if not type(module).__name__.endswith("Norm"):
        return None
    weight = whole(parameters["weight"])
    with torch.no_grad():
        x = torch.linspace(-1.7, 2.3, 3 * weight.numel(), device=weight.device).view(1, 3, -1).to(weight.dtype)
        normalised = root_mean_square_normalised(x.double(), eps)
        module._parameters["weight"] = weight
        try:
            y = module.forward(x).double()  # not by a call, whose hooks may want to gather weights
        finally:
            module._parameters["weight"] = parameters["weight"]
        for forward, scale in ((llama_norm_forward, weight), (gemma_norm_forward, 1 + weight.double())):
            if torch.allclose(y, normalised * scale, rtol=1e-2 if weight.dtype.itemsize == 2 else 1e-5):
                return forward
    return None
