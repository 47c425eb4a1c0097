"""Tap of nn.Embedding: dots by gathering rows of D, never a V x d temporary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostgram.taps.session import NoSampleAxisError, keep, save_scoring, saved, scores, tap_of
from ghostgram.taps.uses import TableUse


class _Embedding(torch.autograd.Function):
    """Rows of a table; the weight gradient stays torch's scatter-add, the dots come from embedding_stats."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int, *scoring: Any) -> Tensor:
        save_scoring(ctx, scoring, ids)
        ctx.entries, ctx.padding = weight.shape[0], padding
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ids, directions, _, segments = saved(ctx)
        b, samples = grad.flatten(1, -2) if grad.dim() > 2 else grad.unsqueeze(1), ids.reshape(ids.shape[0], -1)
        use = TableUse(samples, b, ctx.entries, ctx.padding, segments, ctx.rows)
        grad_weight = dots = None
        if directions is not None:
            dots = use.dots(directions)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.ops.aten.embedding_dense_backward(
                grad.contiguous(), ids.contiguous(), ctx.entries, ctx.padding, False
            )
        keep(ctx, lambda: use)
        return None, grad_weight, None, *scores(dots)


def _check_ids_of_samples(ids: Tensor) -> None:
    """Raises where as many positions as there are samples may have been taken for them."""
    if ids.dim() == 1 and bool((ids == torch.arange(len(ids), device=ids.device)).all()):
        raise NoSampleAxisError(
            f"Embedding: ids {tuple(ids.shape)} = 0, 1, 2, ... may be one id per sample or as many positions as there "
            "are samples; give them a sample axis, e.g. ids.unsqueeze(0) for positions"
        )
    if ids.dim() == 2 and len(ids) == ids.shape[1] > 2 and bool((ids[1:, 1:] == ids[:-1, :-1]).all()):
        if bool((ids == ids[0, 0]).all()):  # as of one type for all tokens
            return
        raise NoSampleAxisError(
            f"Embedding: ids {tuple(ids.shape)} that depend on the distance from the diagonal alone are relative "
            "positions, not one row per sample"
        )


def embedding_forward(module: nn.Embedding, ids: Tensor) -> Tensor:
    """nn.Embedding.forward, tapped. Ids without a sample axis (positions) get one, of stride 0.

    Positions of shape (T,) or (1, T) are the same for every sample, and their output would be broadcast over samples
    later: the gradient that reaches them is already summed. With the axis in front it arrives per sample.
    """
    tap = tap_of(module)
    batch = tap.batch
    if batch > 1 and ids.shape[0] == batch and not torch.compiler.is_compiling():  # which cannot look at values
        _check_ids_of_samples(ids)
    if ids.dim() == 1 and ids.shape[0] != batch:
        ids = ids.unsqueeze(0)
    if ids.shape[0] == 1:
        ids = ids.expand(batch, *ids.shape[1:])
    if ids.shape[0] != batch:
        raise NoSampleAxisError(
            f"Embedding: expected ids whose first dimension is the sample ({batch}), got {tuple(ids.shape)}"
        )
    if tap.segments is not None and ids.shape != tap.segments.shape:
        raise ValueError(
            f"Embedding: packed documents need ids of the shape of segments {tuple(tap.segments.shape)}, got "
            f"{tuple(ids.shape)}"
        )
    slot = tap.slot("weight")
    tap.note_dtype(module.weight.dtype)
    padding = -1 if module.padding_idx is None else module.padding_idx
    scoring = tap.scoring(slot)
    return _Embedding.apply(ids, tap.trained(module.weight), padding, *scoring)  # type: ignore[no-any-return, no-untyped-call]
