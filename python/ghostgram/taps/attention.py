"""Tap of nn.MultiheadAttention: its projections are tapped linear layers, its attention is written out as torch's."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostgram.taps.linear import apply_linear, bias_stats
from ghostgram.taps.session import Slot, Tap, keep, save_scoring, saved, scores, tap_of
from ghostgram.taps.uses import DenseUse, sums


class _Row(torch.autograd.Function):
    """A (1, 1, E) parameter as one more position of every sample."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, batch: int, *scoring: Any) -> Tensor:
        save_scoring(ctx, scoring)
        ctx.shape, ctx.dtype = row.shape, row.dtype
        return row.repeat(batch, 1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        D, _, segments = saved(ctx)
        grad_row = dots = None
        if ctx.needs_input_grad[0] or D is not None:
            D = None if D is None else D.flatten(1)
            grad_row, dots = bias_stats(grad, D, ctx.needs_input_grad[0], segments, ctx.rows)
        keep(ctx, lambda: DenseUse(sums(grad).sum(1).view(-1, *ctx.shape)))
        return None if grad_row is None else grad_row.view(ctx.shape).to(ctx.dtype), None, *scores(dots)


def attention_forward(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """nn.MultiheadAttention.forward, tapped; the sample is on axis 1 of its inputs without batch_first."""
    tap = tap_of(module)
    projections = 1 if query is key and key is value else 2 if key is value else 3
    if query.dim() != 3:
        raise ValueError(f"MultiheadAttention: expected a query with a sample axis, 3-D, got {tuple(query.shape)}")
    if not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    for x in (query, key, value):
        tap.check_samples(x, "MultiheadAttention")
    if is_causal and attn_mask is None:
        raise ValueError("MultiheadAttention: is_causal is a hint about attn_mask, which is None")
    key_padding_mask = F._canonical_mask(
        key_padding_mask, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", query.dtype
    )
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = None  # the hint replaces it
    else:
        attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, False)
        is_causal = False

    q, k, v = _project(module, tap, query, key, value, projections)
    if module.bias_k is not None:
        k, v = (torch.cat([x, _row(module, tap, name, len(x))], 1) for x, name in ((k, "bias_k"), (v, "bias_v")))
    # (B, heads, T, width)
    q, k, v = (x.view(*x.shape[:2], module.num_heads, -1).transpose(1, 2) for x in (q, k, v))
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = _mask(attn_mask, key_padding_mask, q.shape[:2], k.shape[2] - key.shape[1])
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        mixed, weights = _attend(q, k, v, mask, dropout)
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    # As torch does, with the parameters of out_proj, whose own forward nobody calls.
    out = module.out_proj
    of_out = (tap_of(out).slot("weight"), tap_of(out).slot("bias")) if hasattr(out, "_ghostgram") else (Slot(), Slot())
    y = apply_linear(tap, mixed.transpose(1, 2).flatten(2), out.weight, out.bias, *of_out)
    if hasattr(out, "_ghostgram"):
        tap_of(out).note_dtype(y.dtype)  # apply_linear notes it of this module's own parameters
    return y if module.batch_first else y.transpose(0, 1), weights


def _project(
    module: nn.MultiheadAttention, tap: Tap, query: Tensor, key: Tensor, value: Tensor, projections: int
) -> tuple[Tensor, ...]:
    """q, k and v by as few products as there are different inputs: one, q and (k, v) by two, or three."""
    width = module.embed_dim

    def of_rows(name: str, start: int, stop: int) -> tuple[Any, Slot]:
        """Some rows of a parameter and their slot; a whole parameter as it is: a slice costs a copy of its gradient."""
        parameter, slot = getattr(module, name), tap.slot(name)
        if parameter is None or stop - start == len(parameter):
            return parameter, slot
        return parameter[start:stop], slot.part(start, stop)

    def projected(x: Tensor, weight: Tensor, of_weight: Slot, start: int, stop: int) -> Tensor:
        bias, of_bias = of_rows("in_proj_bias", start, stop)
        return apply_linear(tap, x, weight, bias, of_weight, of_bias)

    if module.in_proj_weight is None:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(
            projected(x, getattr(module, name), tap.slot(name), i * width, (i + 1) * width)
            for i, (x, name) in enumerate(zip((query, key, value), names, strict=True))
        )
    edges = {1: (0, 3), 2: (0, 1, 3), 3: (0, 1, 2, 3)}[projections]
    spans = [(start * width, stop * width) for start, stop in pairwise(edges)]
    outputs = [
        projected(x, *of_rows("in_proj_weight", *span), *span)
        for x, span in zip((query, key, value), spans, strict=False)
    ]
    return tuple(y for output in outputs for y in output.chunk(output.shape[-1] // width, -1))


def _row(module: nn.MultiheadAttention, tap: Tap, name: str, batch: int) -> Tensor:
    if tap.segments is not None:
        raise ValueError(f"MultiheadAttention: {name} is a position of no document: exclude it in packed rows")
    scoring = tap.scoring(tap.slot(name))
    return _Row.apply(tap.trained(getattr(module, name)), batch, *scoring)  # type: ignore[no-any-return, no-untyped-call]


def _mask(attn_mask: Tensor | None, padding: Tensor | None, batch: tuple[int, ...], more: int) -> Tensor | None:
    """Both masks in one that broadcasts with (B, heads, T, S), with `more` positions that all may see."""
    if attn_mask is not None:
        attn_mask = F.pad(attn_mask, (0, more))
        attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.view(*batch, *attn_mask.shape[1:])
    if padding is None:
        return attn_mask
    padding = F.pad(padding, (0, more))[:, None, None]
    return padding if attn_mask is None else attn_mask + padding


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, ...]:
    """Attention and its weights (B, heads, T, S), after dropout, as torch returns them."""
    batch = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    q = q * math.sqrt(1.0 / q.shape[-1])
    if mask is None:
        logits = torch.bmm(q, k.transpose(1, 2))
    else:
        mask = mask.expand(*batch, -1, -1).flatten(0, 1)
        logits = torch.baddbmm(mask, q, k.transpose(1, 2))
    weights = F.softmax(logits, dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return tuple(x.view(*batch, *x.shape[1:]) for x in (torch.bmm(weights, v), weights))
