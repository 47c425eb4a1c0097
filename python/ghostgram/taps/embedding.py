"""Tap of nn.Embedding: dots by gathering rows of D, never a V x d temporary."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostgram.ops import _torch
from ghostgram.taps.session import Taps, taps_of


class _Embedding(torch.autograd.Function):
    """Rows of a table; the weight gradient stays torch's scatter-add, the dots come from embedding_stats."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, owner: nn.Embedding, taps: Taps) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.owner, ctx.taps = owner, taps
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        owner: nn.Embedding = ctx.owner
        padding = -1 if owner.padding_idx is None else owner.padding_idx
        rows, samples = grad.flatten(1, -2) if grad.dim() > 2 else grad.unsqueeze(1), ids.reshape(ids.shape[0], -1)
        directions = ctx.taps.directions(owner.weight)
        dots = None if directions is None else _dots(samples, rows, padding, directions)
        ctx.taps.add(owner.weight, grad, dots, partial(_dots, samples, rows, padding))
        grad_weight = torch.ops.aten.embedding_dense_backward(
            grad.contiguous(), ids.contiguous(), owner.num_embeddings, padding, False
        )
        return None, grad_weight, None, None


def _dots(ids: Tensor, b: Tensor, padding: int, directions: Tensor) -> Tensor:
    dots: Tensor = _torch.call("embedding_stats", ids, b, directions, padding, False, "auto")[1]
    return dots


def embedding_forward(module: nn.Embedding, ids: Tensor) -> Tensor:
    """nn.Embedding.forward, tapped. Ids without a sample axis (positions) get one, of stride 0.

    Positions of shape (T,) or (1, T) are the same for every sample, and their output would be broadcast over samples
    later: the gradient that reaches them is already summed. With the axis in front it arrives per sample.
    """
    taps = taps_of(module)
    batch = taps.batch
    if (
        ids.dim() == 1
        and ids.shape[0] == batch
        and batch > 1
        and bool((ids == torch.arange(batch, device=ids.device)).all())
    ):
        raise ValueError(
            f"Embedding: ids {tuple(ids.shape)} = 0, 1, 2, ... may be one id per sample or as many positions as there "
            "are samples; give them a sample axis, e.g. ids.unsqueeze(0) for positions"
        )
    if ids.dim() == 1 and ids.shape[0] != batch:
        ids = ids.unsqueeze(0)
    if ids.shape[0] == 1:
        ids = ids.expand(batch, *ids.shape[1:])
    if ids.shape[0] != batch:
        raise ValueError(
            f"Embedding: expected ids whose first dimension is the sample ({batch}), got {tuple(ids.shape)}"
        )
    return _Embedding.apply(ids, module.weight, module, taps)  # type: ignore[no-any-return, no-untyped-call]
