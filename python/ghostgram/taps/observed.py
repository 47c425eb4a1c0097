"""Taps of layers that torch computes and differentiates itself: on the way back, dots alone are taken.

A layer's dots with D are <gradient at its output, derivative of its output along D>. Where that derivative costs
little, nothing else of the layer need be written anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostgram.taps.session import SCORING, Slot, Tap, keep, save_scoring, saved, scores, tap_of
from ghostgram.taps.uses import ContractedUse

Contract = Callable[..., Tensor]
"""(rows, segments, *tensors, gradient at the output, D) -> (rows, K) dots."""


class _Observed(torch.autograd.Function):
    """A layer's output, handed on; saves the tensors that a contraction with its gradient needs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, contract: Contract, *rest: Any) -> Tensor:
        scoring, tensors = rest[:SCORING], rest[SCORING:]
        save_scoring(ctx, scoring, *tensors)
        ctx.contract = contract
        return y.detach()  # no view, which nobody could change in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *tensors, D, _, segments = saved(ctx)
        dots = None if D is None else ctx.contract(ctx.rows, segments, *tensors, grad, D)
        if ctx.later is not None and (parameter := ctx.later[1].parameter) is not None:
            contract = partial(ctx.contract, ctx.rows, segments, *tensors, grad)
            keep(ctx, partial(ContractedUse, contract, tuple(parameter.shape), grad, ctx.rows))
        return grad, None, *scores(dots), *(None for _ in tensors)


def observed(tap: Tap, slot: Slot, y: Tensor, contract: Contract, *tensors: Tensor | None) -> Tensor:
    """y, scored for the parameter of a slot by `contract(rows, segments, *tensors, gradient of y, D)`."""
    return _Observed.apply(y, contract, *tap.scoring(slot), *tensors)  # type: ignore[no-any-return, no-untyped-call]


# nn.EmbeddingBag ---------------------------------------------------------------------------------------------------


def bag_forward(
    module: nn.EmbeddingBag, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
) -> Tensor:
    """nn.EmbeddingBag.forward, tapped; a bag is a sample."""
    tap = tap_of(module)
    if tap.segments is not None:
        raise ValueError("EmbeddingBag: adds up positions, which packed documents share: exclude it")
    y = _bags(module, tap.trained(module.weight), ids, offsets, per_sample_weights)
    if y.shape[0] != tap.batch:
        raise ValueError(f"EmbeddingBag: expected one bag per sample ({tap.batch}), got {y.shape[0]}")
    tap.note_dtype(module.weight.dtype)
    contract = partial(bag_dots, module)
    return observed(tap, tap.slot("weight"), y, contract, ids, offsets, per_sample_weights)


def bag_dots(
    module: nn.EmbeddingBag,
    _rows: int,
    _segments: None,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    grad: Tensor,
    D: Tensor,
) -> Tensor:
    """(B, K): each bag's gradient with the bag of rows of D_k, from reading those rows alone."""
    weights = None if weights is None else weights.to(D.dtype)
    return torch.stack([(_bags(module, D_k, ids, offsets, weights) * grad).sum(1) for D_k in D], 1)


def _bags(
    module: nn.EmbeddingBag, weight: Tensor | None, ids: Tensor, offsets: Tensor | None, weights: Tensor | None
) -> Tensor:
    assert weight is not None
    return F.embedding_bag(
        ids,
        weight,
        offsets,
        mode=module.mode,
        per_sample_weights=weights,
        include_last_offset=module.include_last_offset,
        padding_idx=module.padding_idx,
    )
