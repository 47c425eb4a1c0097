"""The ops as one would write them in torch or NumPy: what benchmarks and `ghostgram bench` time ours against.

Products of matrices are written so that both take them; the rest is torch's, whose tensors these functions get.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ghostgram import _arrays

Array = Any
Made = dict[str, Any]


def _as(like: Array, x: Array) -> Array:
    """x in the dtype of `like`: products of matrices want one dtype."""
    return x.to(like.dtype) if _arrays.is_torch(x) else x.astype(like.dtype, copy=False)


# ---- Per-sample gradients of a linear layer -------------------------------------------------------------------------


def weight_gradient(a: Array, b: Array) -> Array:
    """The sum over samples alone: the product that training forms anyway."""
    return b.reshape(-1, b.shape[-1]).T @ a.reshape(-1, a.shape[-1])


def statistics_of_stored(a: Array, b: Array, D: Array) -> tuple[Array, Array, Array]:
    """The weight gradient, squared norms and dots of (B, p, d) gradients that are stored."""
    gradients = b.swapaxes(1, 2) @ a
    flat = gradients.reshape(len(gradients), -1)
    return gradients.sum(0), (flat * flat).sum(1), _as(D, flat) @ D.reshape(len(D), -1).T


def gram_of_tokens(a: Array, b: Array, a2: Array, b2: Array, diagonal: bool) -> Array:
    """Inner products of gradients by products of tokens, all T x T2 of them stored."""
    if diagonal:
        return ((a @ a.swapaxes(1, 2)) * (b @ b.swapaxes(1, 2))).sum((1, 2))
    a2, b2 = (a, b) if a2 is None else (a2, b2)
    left, right = ((x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])) for x, y in ((a, a2), (b, b2)))
    scores = left[0] @ left[1].T
    scores *= right[0] @ right[1].T
    return scores.reshape(*a.shape[:2], *a2.shape[:2]).sum((1, 3))


def gram_of_stored(a: Array, b: Array, a2: Array, b2: Array, diagonal: bool) -> Array:
    """Inner products of (B, p d) gradients that are stored."""
    first = (b.swapaxes(1, 2) @ a).reshape(len(a), -1)
    if diagonal:
        return (first * first).sum(1)
    return first @ (first if a2 is None else (b2.swapaxes(1, 2) @ a2).reshape(len(a2), -1)).T


def projection(a: Array, b: Array, P_out: Array, P_in: Array) -> Array:
    """Kronecker projections: tokens to few features, then one product per sample."""
    return (b @ P_out.T).swapaxes(1, 2) @ (a @ P_in.T)


def sketch_of_stored(a: Array, b: Array, buckets: Array, signs: Array, size: int, at_once: int = 8) -> Array:
    """Count sketches of gradients, so many of them stored at a time; buckets and signs are (nonzeros, p d)."""
    out = a.new_zeros(len(a), size)
    for first in range(0, len(a), at_once):
        chunk = slice(first, first + at_once)
        gradients = (b[chunk].mT @ a[chunk]).flatten(1)
        for bucket, sign in zip(buckets, signs, strict=True):
            out[chunk].index_add_(1, bucket, gradients * sign)
    return out / len(buckets) ** 0.5


def steps_of_stored(
    a: Array, b: Array, clip: Array, m: Array, v: Array, D: Array,
    eta: float, beta1: float, beta2: float, eps: float, bc1: float, bc2: float,
) -> Array:  # fmt: skip
    """Dots with the change of AdamW's step, from (B, p, d) tensors: gradients, roots and changes."""
    g = clip[:, None, None] * (b.mT @ a).to(clip.dtype)
    r0 = (v * (beta2 / bc2)).sqrt()
    q = g * g * ((1 - beta2) / bc2)
    r = (r0 * r0 + q).sqrt()
    own = g * ((1 - beta1) / bc1)
    change = (own - (m * (beta1 / bc1)) * q / ((r + r0) * (r0 + eps))) / (r + eps) * -eta
    return change.flatten(1) @ D.flatten(1).to(clip.dtype).T


# ---- Other layers ---------------------------------------------------------------------------------------------------


def rows_by_sorting(ids: Array, b: Array, D: Array) -> tuple[Array, Array]:
    """norms^2 by the rows of equal (sample, id) pairs, as Opacus groups them; dots by gathering rows of D."""
    import torch

    samples = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
    pairs, where = torch.unique(samples * (int(ids.max()) + 1) + ids.flatten(), return_inverse=True)
    rows = b.new_zeros(len(pairs), b.shape[-1]).index_add_(0, where, b.flatten(0, 1))
    squares = torch.linalg.vecdot(rows, rows)
    norms2 = b.new_zeros(len(ids)).index_add_(0, pairs // (int(ids.max()) + 1), squares)
    return norms2, None if D is None else (b * D[0][ids]).sum((1, 2))[:, None]


def affine_of_batch(
    b: Array, x: Array, mean: Array, rstd: Array, D_weight: Array, D_bias: Array, channels_first: bool
) -> Any:
    """Gradients of the whole batch, with no word on single samples: what training computes anyway."""
    import torch

    if channels_first:
        if x is None:
            return b.sum((0, 2))
        sizes, weight = (*b.shape, mean.shape[1]), mean.new_ones(b.shape[1])
        return torch.ops.aten.native_group_norm_backward(b, x, mean, rstd, weight, *sizes, [False, True, True])
    if x is None:
        return b.sum((0, 1))
    if mean is None:
        return (b * (x * rstd[..., None])).sum((0, 1)), b.sum((0, 1))
    shape = [b.shape[-1]]
    weight = mean.new_ones(shape)
    mean, rstd = mean[..., None], rstd[..., None]
    return torch.ops.aten.native_layer_norm_backward(b, x, shape, mean, rstd, weight, weight, [False, True, True])


def affine_of_samples(
    b: Array, x: Array, mean: Array, rstd: Array, D_weight: Array, D_bias: Array, channels_first: bool
) -> list[tuple[Array, ...]]:
    """Gradients, squared norms and dots of bias and scale, from (B, F) sums of products that are stored."""
    import torch

    tokens = 2 if channels_first else 1
    rows = [(b.sum(tokens), D_bias)]
    if x is not None:
        if channels_first:
            mean, rstd = (y.repeat_interleave(b.shape[1] // y.shape[1], 1) for y in (mean, rstd))
        centred = x if mean is None else x - mean[..., None]
        rows.append(((b * (centred * rstd[..., None])).sum(tokens), D_weight))
    return [(row.sum(0), torch.linalg.vecdot(row, row), row.to(D.dtype) @ D.T) for row, D in rows]


# ---- The others -----------------------------------------------------------------------------------------------------


def four_of_softmax(logits: Array, labels: Array) -> tuple[Array, ...]:
    """Loss, EL2N, entropy and largest probability of (N, C) logits in whole arrays, in float32 like ours."""
    import torch

    log_p = torch.log_softmax(logits, 1, dtype=torch.float32)
    p = log_p.exp()
    entropy, largest = -(p * log_p).sum(1), p.amax(1)
    if labels.is_floating_point():
        return -(labels * log_p).sum(1), p.sub_(labels).norm(dim=1), entropy, largest
    loss = -log_p.gather(1, labels[:, None])[:, 0]
    p.scatter_add_(1, labels[:, None], torch.full((len(labels), 1), -1.0))
    return loss, p.norm(dim=1), entropy, largest


def matching_loss(student: list[Array], start: list[Array], target: list[Array]) -> Array:
    """The sums of squared errors that matching codes call."""
    import torch

    def squares(xs: list[Array]) -> Array:
        return sum(torch.nn.functional.mse_loss(x, t, reduction="sum") for x, t in zip(xs, target, strict=True))

    return squares(student) / squares(start)


def noise_and_partition(scores: Any, k: int) -> Any:
    """Draws without replacement in the shortest way in NumPy: noise in place, a partition, and the best k sorted."""
    keys = np.random.default_rng(0).random(len(scores))
    for _ in range(2):
        np.log(keys, out=keys)
        np.negative(keys, out=keys)
    keys += scores
    np.negative(keys, out=keys)
    best = np.argpartition(keys, k)[:k]
    return best[np.argsort(keys[best])]


# ---- By op ----------------------------------------------------------------------------------------------------------


def expressions(op: str, case: Any, made: Made) -> dict[str, Callable[[], Any]]:
    """Name -> the op, or what training does in its place, on the arrays of a typical case, in their own framework."""
    return _OF_OP[op](case, made) if _arrays.is_torch(next(iter(made.values()))[0]) or op in _IN_NUMPY else {}


def _grad_stats(_: Any, made: Made) -> dict[str, Callable[[], Any]]:
    a, b, D = made["a"], made["b"], made["D"]
    return {
        "weight gradient alone": lambda: weight_gradient(a, b),
        "gradients stored": lambda: statistics_of_stored(a, b, D),
    }


def _grad_gram(case: Any, made: Made) -> dict[str, Callable[[], Any]]:
    return {
        "products of tokens stored": lambda: gram_of_tokens(**made, diagonal=case.diagonal),
        "gradients stored": lambda: gram_of_stored(**made, diagonal=case.diagonal),
    }


def _embedding_stats(_: Any, made: Made) -> dict[str, Callable[[], Any]]:
    return {"equal tokens by sorting": lambda: rows_by_sorting(**made)}


def _affine_stats(case: Any, made: Made) -> dict[str, Callable[[], Any]]:
    return {
        "sum over the batch alone": lambda: affine_of_batch(**made, channels_first=case.groups is not None),
        "sums of samples stored": lambda: affine_of_samples(**made, channels_first=case.groups is not None),
    }


def _gumbel_topk(case: Any, made: Made) -> dict[str, Callable[[], Any]]:
    scores = _arrays.to_numpy(made["scores"])
    return {"NumPy's noise and partition": lambda: noise_and_partition(scores, case.k)}


def _grad_project(case: Any, made: Made) -> dict[str, Callable[[], Any]]:
    a, b = made["a"], made["b"]
    rng = np.random.default_rng(0)
    if not case.sparse:
        P_out, P_in = (
            _as(a, _arrays.in_framework(rng.standard_normal((k, n), dtype=np.float32), _arrays.framework(a, "a")))
            for k, n in zip(case.size, (case.p, case.d), strict=True)
        )
        return {"tokens projected": lambda: projection(a, b, P_out, P_in)}
    if not _arrays.is_torch(a):
        return {}
    size, nonzeros = case.size
    buckets = _arrays.from_numpy(rng.integers(size, size=(nonzeros, case.p * case.d)), "torch")
    signs = _arrays.from_numpy(rng.choice(np.array([-1, 1], np.float32), (nonzeros, case.p * case.d)), "torch")
    return {"gradients stored": lambda: sketch_of_stored(a, b, buckets, signs, size)}


def _softmax_stats(_: Any, made: Made) -> dict[str, Callable[[], Any]]:
    import torch

    logits, labels = made["logits"].flatten(0, 1), made["labels"].flatten()
    return {
        "log_softmax alone": lambda: torch.log_softmax(logits, 1),
        "whole arrays": lambda: four_of_softmax(logits, labels),
    }


def _trajectory_match(_: Any, made: Made) -> dict[str, Callable[[], Any]]:
    import torch

    leaves = [x.clone().requires_grad_() for x in made["student"]]
    start, target = made["start"], made["target"]
    return {"loss and autograd": lambda: torch.autograd.grad(matching_loss(leaves, start, target), leaves)}


def _adam_dots(case: Any, made: Made) -> dict[str, Callable[[], Any]]:
    return {
        "weight gradient alone": lambda: weight_gradient(made["a"], made["b"]),
        "gradients and steps stored": lambda: steps_of_stored(*made.values(), *case.scalars),
    }


_IN_NUMPY = {"grad_stats", "grad_gram", "gumbel_topk", "grad_project"}
_OF_OP: dict[str, Callable[[Any, Made], dict[str, Callable[[], Any]]]] = {
    "grad_stats": _grad_stats,
    "grad_gram": _grad_gram,
    "embedding_stats": _embedding_stats,
    "affine_stats": _affine_stats,
    "gumbel_topk": _gumbel_topk,
    "grad_project": _grad_project,
    "softmax_stats": _softmax_stats,
    "trajectory_match": _trajectory_match,
    "adam_dots": _adam_dots,
}
