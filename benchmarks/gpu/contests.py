"""Every op beside what one would write instead: cuBLAS, torch expressions, the formulas of Opacus and of GhostSuite.

Sizes are those of a training step of GPT-2 small on 16 samples of 1024 tokens, unless the op is about something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ghostgram as gg
from ghostgram.testing.compare import cases_of

Call = Callable[[], Any]


@dataclass(frozen=True)
class Contest:
    """One call of ours, and what it is compared with."""

    op: str
    shape: str
    case: Any
    """Of testing/cases, which counts FLOPs and bytes."""
    ours: Callable[[str], Any]
    """backend -> the result, through the front door."""
    rivals: dict[str, Call]
    expected: Call | None = None
    """Tensors that ours should equal, up to the rounding of a rival's."""


def _randn(device: str, dtype: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=getattr(torch, dtype))


def stored(a: Tensor, b: Tensor, D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight_grad, norms and dots of gradients that are all stored."""
    gradients = torch.bmm(b.mT, a).float()
    return gradients.sum(0), gradients.flatten(1).norm(dim=1), gradients.flatten(1) @ D.flatten()


def ghost_dots(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> tuple[Tensor, Tensor]:
    """GhostSuite's: the weight gradient, and dots with another batch's by products of tokens."""
    scores = (a @ other_a.flatten(0, 1).T) * (b @ other_b.flatten(0, 1).T)
    return b.flatten(0, 1).T @ a.flatten(0, 1), scores.sum((1, 2), dtype=torch.float32)


def ghost_norms(a: Tensor, b: Tensor) -> Tensor:
    """Opacus': norms by products of tokens."""
    products = torch.einsum("nik,njk->nij", b, b) * torch.einsum("nik,njk->nij", a, a)
    return products.sum((1, 2), dtype=torch.float32).clamp(min=0).sqrt()


def in_tf32(call: Call) -> Call:
    """The call with float32 products rounded to TF32."""

    def run() -> Any:
        torch.backends.cuda.matmul.allow_tf32 = True
        result = call()
        torch.backends.cuda.matmul.allow_tf32 = False
        return result

    return run


def grad_stats(device: str, dtype: str, tiny: bool) -> Iterator[Contest]:
    shapes = [(16, 1024, 768, 3072), (16, 1024, 768, 768), (16, 1024, 3072, 768)]
    for samples, tokens, d, p in shapes if not tiny else [(2, 5, 8, 12)]:
        a, b = _randn(device, dtype, samples, tokens, d), _randn(device, dtype, samples, tokens, p)
        other_a, other_b = a[:1].clone(), b[:1].clone()
        D = _randn(device, "float32", 1, p, d)
        gemm = lambda a=a, b=b: torch.mm(b.flatten(0, 1).T, a.flatten(0, 1))  # noqa: E731
        rivals = {"weight gradient alone (cuBLAS)": gemm, "gradients stored": lambda a=a, b=b, D=D: stored(a, b, D)}
        if dtype == "float32":
            rivals["weight gradient alone (cuBLAS, TF32)"] = in_tf32(gemm)
        yield Contest(
            "grad_stats", f"{samples}x{tokens}x{d}x{p}, K = 1", cases_of("grad_stats").Case(samples, tokens, d, p, 1),
            lambda backend, a=a, b=b, D=D: gg.grad_stats(a, b, D, backend=backend),
            rivals | {
                "weight gradient and products of tokens (GhostSuite)":
                lambda a=a, b=b, x=other_a, y=other_b: ghost_dots(a, b, x, y),
            },
            lambda a=a, b=b, D=D: stored(a.float(), b.float(), D),
        )  # fmt: skip


def grad_gram(device: str, dtype: str, tiny: bool) -> Iterator[Contest]:
    Case = cases_of("grad_gram").Case
    samples, tokens, d, p = (16, 1024, 768, 768) if not tiny else (3, 4, 8, 12)
    a, b = _randn(device, dtype, samples, tokens, d), _randn(device, dtype, samples, tokens, p)

    def from_stored() -> Tensor:
        gradients = torch.bmm(b.mT, a).flatten(1)
        return gradients @ gradients.T

    def from_tokens() -> Tensor:
        scores = (a.flatten(0, 1) @ a.flatten(0, 1).T).mul_(b.flatten(0, 1) @ b.flatten(0, 1).T)
        return scores.view(samples, tokens, samples, tokens).sum((1, 3))

    yield Contest(
        "grad_gram", f"{samples}x{tokens}x{d}x{p}", Case(samples, tokens, d, p),
        lambda backend: gg.grad_gram(a, b, backend=backend),
        {"gradients stored": from_stored, "products of tokens": from_tokens}, from_stored,
    )  # fmt: skip
    for tokens in (16, 1024) if not tiny else (4,):
        a, b = _randn(device, dtype, samples, tokens, d), _randn(device, dtype, samples, tokens, p)
        yield Contest(
            "grad_gram", f"{samples}x{tokens}x{d}x{p}, norms", Case(samples, tokens, d, p, diagonal=True),
            lambda backend, a=a, b=b: gg.grad_norms(a, b, backend=backend),
            {"products of tokens (Opacus)": lambda a=a, b=b: ghost_norms(a, b),
             "gradients stored": lambda a=a, b=b: torch.bmm(b.mT, a).flatten(1).norm(dim=1)},
            lambda a=a, b=b: ghost_norms(a.float(), b.float()),
        )  # fmt: skip


def embedding_stats(device: str, dtype: str, tiny: bool) -> Iterator[Contest]:
    samples, tokens, rows, features = (16, 1024, 50257, 768) if not tiny else (2, 6, 5, 8)
    ids = torch.randint(rows, (samples, tokens), device=device)
    b, D = _randn(device, dtype, samples, tokens, features), _randn(device, "float32", 1, rows, features)

    def by_sorting() -> tuple[Tensor, Tensor]:
        pairs = torch.arange(samples, device=device)[:, None] * rows + ids
        found, where = torch.unique(pairs, return_inverse=True)
        sums = torch.zeros(len(found), features, device=device).index_add_(0, where.flatten(), b.flatten(0, 1).float())
        squares = torch.zeros(samples, device=device).index_add_(0, found // rows, torch.linalg.vecdot(sums, sums))
        return squares.sqrt(), (b * D[0][ids]).sum((1, 2))

    def by_pairs() -> tuple[Tensor, Tensor]:
        same = ids[:, :, None] == ids[:, None, :]
        squares = torch.einsum("nik,njk->nij", b, b).mul_(same).sum((1, 2), dtype=torch.float32)
        return squares.sqrt(), (b * D[0][ids]).sum((1, 2))

    yield Contest(
        "embedding_stats", f"{samples}x{tokens} of {rows}x{features}, K = 1",
        cases_of("embedding_stats").Case(samples, tokens, rows, features, 1),
        lambda backend: gg.embedding_stats(ids, b, D, backend=backend),
        {"equal tokens by sorting": by_sorting, "products of tokens (GhostSuite)": by_pairs}, by_sorting,
    )  # fmt: skip


def affine_stats(device: str, dtype: str, tiny: bool) -> Iterator[Contest]:
    samples, tokens, features = (16, 1024, 768) if not tiny else (2, 5, 8)
    b, x = _randn(device, dtype, samples, tokens, features), _randn(device, dtype, samples, tokens, features)
    mean, rstd = x.float().mean(-1), 1 / x.float().std(-1)
    D = _randn(device, "float32", 1, features)

    def summed() -> Any:
        one = torch.ones(features, device=device, dtype=b.dtype if device == "cuda" else mean.dtype)
        given = (b, x, [features], mean[..., None], rstd[..., None], one, one, [False, True, True])
        return torch.ops.aten.native_layer_norm_backward(*given)

    def by_sample() -> list[Tensor]:
        scaled = (x - mean[..., None]) * rstd[..., None]
        rows = [(b * scaled).sum(1), b.float().sum(1)]
        return [y for row in rows for y in (row.sum(0), row.norm(dim=1), row @ D[0])]

    def expected() -> list[Tensor]:
        found = by_sample()
        return [found[i] for i in (0, 3, 1, 4, 2, 5)]

    yield Contest(
        "affine_stats", f"{samples}x{tokens}x{features}, K = 1",
        cases_of("affine_stats").Case(samples, tokens, features, 1),
        lambda backend: gg.affine_stats(b, x, mean, rstd, D, D, backend=backend),
        {"LayerNorm's own, summed over samples": summed, "by sample in torch": by_sample}, expected,
    )  # fmt: skip


def gumbel_topk(device: str, dtype: str, tiny: bool) -> Iterator[Contest]:
    count, k = (10_000_000, 100_000) if not tiny else (300, 7)
    scores = _randn(device, dtype, count)
    yield Contest(
        "gumbel_topk", f"{k} of {count}", cases_of("gumbel_topk").Case(count, k),
        lambda backend: gg.gumbel_topk(scores, k, backend=backend),
        {"noise and topk in torch": lambda: (scores - torch.rand_like(scores).log_().neg_().log_()).topk(k)},
    )  # fmt: skip


def grad_project(device: str, dtype: str, tiny: bool) -> Iterator[Contest]:
    samples, tokens, d, p, k = (16, 1024, 768, 3072, 64) if not tiny else (2, 4, 8, 12, 3)
    a, b = _randn(device, dtype, samples, tokens, d), _randn(device, dtype, samples, tokens, p)
    P_out, P_in = _randn(device, dtype, k, p), _randn(device, dtype, k, d)

    def projected() -> tuple[Tensor]:
        return (torch.bmm((b @ P_out.T).mT, a @ P_in.T),)

    yield Contest(
        "grad_project", f"{samples}x{tokens}x{d}x{p} to {k}x{k}",
        cases_of("grad_project").Case(samples, tokens, d, p, (k, k), given=cases_of("grad_project").BOTH),
        lambda backend: gg.grad_project(a, b, P_out, P_in, backend=backend),
        {"projected tokens and bmm in torch": projected}, projected,
    )  # fmt: skip


def softmax_stats(device: str, dtype: str, tiny: bool) -> Iterator[Contest]:
    rows, classes = (16 * 1024, 50257) if not tiny else (6, 11)
    logits, labels = 3 * _randn(device, dtype, rows, classes), torch.randint(classes, (rows,), device=device)

    def with_torch() -> tuple[Tensor, ...]:
        log_p = torch.log_softmax(logits, 1, dtype=torch.float32)
        p = log_p.exp()
        entropy, largest = -(p * log_p).sum(1), p.amax(1)
        loss = -log_p.gather(1, labels[:, None])[:, 0]
        p.scatter_add_(1, labels[:, None], torch.full((rows, 1), -1.0, device=device))
        return loss, p.norm(dim=1), entropy, largest

    yield Contest(
        "softmax_stats", f"{rows}x{classes}", cases_of("softmax_stats").Case(1, rows, classes),
        lambda backend: gg.softmax_stats(logits, labels, backend=backend),
        {"all four in torch": with_torch,
         "cross_entropy alone": lambda: F.cross_entropy(logits, labels, reduction="none")},
        with_torch,
    )  # fmt: skip


def trajectory_match(device: str, dtype: str, tiny: bool) -> Iterator[Contest]:
    sizes = (2_000_000,) * 50 if not tiny else (7, 12)
    student, start, target = ([_randn(device, dtype, n) for n in sizes] for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in student]

    def loss(xs: list[Tensor]) -> Tensor:
        return sum(F.mse_loss(x, t, reduction="sum") for x, t in zip(xs, target, strict=True))

    def with_autograd() -> tuple[Tensor, list[Tensor]]:
        value = loss(leaves) / loss(start)
        return value.detach(), list(torch.autograd.grad(value, leaves))

    yield Contest(
        "trajectory_match", f"{len(sizes)} tensors of {sizes[0]}", cases_of("trajectory_match").Case(sizes, "both"),
        lambda backend: gg.trajectory_match_grad(student, start, target, backend=backend),
        {"torch with autograd": with_autograd}, with_autograd,
    )  # fmt: skip


def adam_dots(device: str, dtype: str, tiny: bool) -> Iterator[Contest]:
    samples, tokens, d, p = (16, 1024, 768, 3072) if not tiny else (2, 5, 8, 12)
    a, b = _randn(device, dtype, samples, tokens, d), _randn(device, dtype, samples, tokens, p)
    m, D = _randn(device, "float32", p, d), _randn(device, "float32", p, d)
    v, clip = m.square(), torch.full((samples,), 0.03, device=device)
    eta, beta1, beta2, eps, bc1, bc2 = scalars = (1e-3, 0.9, 0.95, 1e-8, 1.0, 1.0)

    def with_torch() -> Tensor:
        g = clip[:, None, None] * torch.bmm(b.mT, a).float()
        r0, q = (beta2 / bc2 * v).sqrt(), (1 - beta2) / bc2 * g * g
        r = (r0 * r0 + q).sqrt()
        change = -eta * ((1 - beta1) / bc1 * g - beta1 / bc1 * m * q / ((r + r0) * (r0 + eps))) / (r + eps)
        return change.flatten(1) @ D.flatten()

    yield Contest(
        "adam_dots", f"{samples}x{tokens}x{d}x{p}", cases_of("adam_dots").Case(samples, tokens, d, p, 1),
        lambda backend: gg.adam_dots(a, b, clip, m, v, D, scalars, backend=backend),
        {"gradients and steps stored": with_torch}, with_torch,
    )  # fmt: skip


CONTESTS: dict[str, Callable[[str, str, bool], Iterator[Contest]]] = {
    function.__name__: function
    for function in (
        grad_stats, grad_gram, embedding_stats, affine_stats,
        gumbel_topk, grad_project, softmax_stats, trajectory_match, adam_dots,
    )
}  # fmt: skip


def difference(found: Any, expected: Any) -> float:
    """The largest |found - expected| / max |expected| of all tensors."""
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    return max(float((x.double() - y.double()).abs().max() / y.double().abs().max()) for x, y in pairs)


def _tensors(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results.flatten()]
    return [x for result in results if result is not None for x in _tensors(result)]
