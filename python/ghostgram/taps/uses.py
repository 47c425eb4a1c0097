"""What a backward leaves of every sample's gradient, use by use of a parameter: enough to contract, to sum, to pair.

A parameter's per-sample gradient is the sum over its uses (a tied weight has several), and so is all that is linear in
it: dots, weighted sums, and parts of the gradients themselves, whose products are Gram matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghostgram.ops import _torch

Scale = Tensor | float
"""What per-sample gradients are multiplied by, elementwise: a number, or a tensor of the parameter's shape."""

Entries = slice | Tensor
"""Entries along a parameter's first axis: a range of them, or (n,) int64."""

AT_ONCE = 1 << 22
"""Elements of per-sample gradients that are formed at a time: 16 MiB of float32."""


COLUMNS = 1024
"""How many columns of per-sample gradients are multiplied at a time."""


class Use(ABC):
    """One use of a parameter, of which row i (a sample, or a document) has the gradient G_i."""

    rows: int
    """The number of gradients."""

    @abstractmethod
    def dots(self, D: Tensor) -> Tensor:
        """(rows, K) dots <G_i, D_k> with directions (K, *parameter shape)."""

    @abstractmethod
    def gradient(self, weights: Tensor) -> Tensor:
        """sum_i weights_i G_i, of the parameter's shape, in the dtype of sums; rows of weight 0 cost nothing.

        Args:
            weights: (rows,) floating point, on the CPU.
        """

    def part(self, entries: Entries) -> Tensor:
        """(rows, n, ...) the gradients' entries along the parameter's first axis; a tensor of them is ascending.

        Unless a use knows better, one gradient after another.
        """
        return torch.stack([self.gradient(one)[entries] for one in torch.eye(self.rows)])


Kept = list[tuple[nn.Parameter, Use]]
"""What layers keep of a backward: each use, with its parameter."""


@dataclass(frozen=True)
class DenseUse(Use):
    """The gradients themselves, (rows, *parameter shape): for biases, scales and shifts, which are small."""

    gradients: Tensor

    @property
    def rows(self) -> int:  # type: ignore[override]
        """Their number."""
        return self.gradients.shape[0]

    def dots(self, D: Tensor) -> Tensor:
        """By a matrix product."""
        with exact(D):
            return self.gradients.flatten(1).to(D.dtype) @ D.flatten(1).T

    def gradient(self, weights: Tensor) -> Tensor:
        """By a matrix product."""
        with exact(self.gradients):
            return (weights.to(self.gradients) @ self.gradients.flatten(1)).view(self.gradients.shape[1:])

    def part(self, entries: Entries) -> Tensor:
        """As they are."""
        return self.gradients[:, entries]


@dataclass(frozen=True)
class MatrixUse(Use):
    """A product with a matrix: G_i = b_i^T a_i, from inputs and output gradients of every position."""

    a: Tensor
    """(B, T, columns of the matrix)."""
    b: Tensor
    """(B, T, rows of the matrix)."""
    segments: Tensor | None
    """(B, T) row of each position, negative for none; None where row i is sample i."""
    rows: int

    @property
    def has_few_tokens(self) -> bool:
        """Whether products of tokens take fewer FLOPs for a Gram matrix than forming gradients does."""
        (B, T, d), p = self.a.shape, self.b.shape[-1]
        return self.segments is None and B * T * T * (d + p) < 2 * (T + B) * d * p

    def dots(self, D: Tensor) -> Tensor:
        """By grad_stats; of documents as sums of b_t . (D_k a_t) over their positions."""
        if self.segments is None:
            dots: Tensor = _torch.call("grad_stats", self.a, self.b, D, False, False, "auto")[2]
            return dots
        a, b = self.a.flatten(0, 1), self.b.flatten(0, 1)
        with exact(a):
            # By way of the narrower side, whose products with D are the temporary.
            if a.shape[-1] <= b.shape[-1]:
                scores = [((b.to(D_k.dtype) @ D_k) * a).sum(1) for D_k in D]
            else:
                scores = [((a.to(D_k.dtype) @ D_k.T) * b).sum(1) for D_k in D]
        return by_row(torch.stack(scores, 1), self.segments, self.rows)

    def gradient(self, weights: Tensor) -> Tensor:
        """By grad_stats over the samples that count, of which the narrower side is weighted: 2 n T d p FLOPs."""
        chosen, factors = _chosen(weights, self.segments)
        a, b = (x.index_select(0, chosen.to(x.device)) for x in (self.a, self.b))
        if a.shape[-1] <= b.shape[-1]:
            a = a * factors.to(a)[..., None]
        else:
            b = b * factors.to(b)[..., None]
        gradient: Tensor = _torch.call("grad_stats", a, b, None, True, False, "auto")[0]
        return gradient

    def part(self, entries: Entries) -> Tensor:
        """By a product of matrices for every sample: 2 B T d n FLOPs."""
        _need_samples(self.segments)
        with exact(self.a):
            return torch.bmm(sums(self.b[:, :, entries]).mT, sums(self.a))


@dataclass(frozen=True)
class TableUse(Use):
    """A lookup in a table: row v of G_i is the sum of b_it over the positions with ids_it = v."""

    ids: Tensor
    """(B, T)."""
    b: Tensor
    """(B, T, E)."""
    entries: int
    padding: int
    """An entry that has no gradient; -1 for none."""
    segments: Tensor | None
    """(B, T) row of each position, negative for none; None where row i is sample i."""
    rows: int

    def dots(self, D: Tensor) -> Tensor:
        """By embedding_stats."""
        ids, b = self.ids, self.b
        if self.segments is not None:  # every position is a sample of its own, until they are added up
            ids, b = ids.reshape(-1, 1), b.reshape(-1, 1, b.shape[-1])
        dots: Tensor = _torch.call("embedding_stats", ids, b, D, self.padding, False, "auto")[1]
        return by_row(dots, self.segments, self.rows)

    def gradient(self, weights: Tensor) -> Tensor:
        """By torch's own scatter-add over the samples that count."""
        chosen, factors = _chosen(weights, self.segments)
        chosen = chosen.to(self.b.device)
        b = sums(self.b.index_select(0, chosen)) * factors.to(sums(self.b))[..., None]
        ids = self.ids.index_select(0, chosen)
        gradient: Tensor = torch.ops.aten.embedding_dense_backward(b, ids, self.entries, self.padding, False)
        return gradient

    def part(self, entries: Entries) -> Tensor:
        """By adding up positions with the same entry."""
        _need_samples(self.segments)
        if isinstance(entries, slice):
            entries = torch.arange(entries.start, entries.stop, device=self.ids.device)
        place = torch.searchsorted(entries, self.ids.contiguous()).clamp_max(len(entries) - 1)
        counts = (entries[place] == self.ids) & (self.ids != self.padding)
        target = (torch.arange(self.rows, device=self.ids.device)[:, None] * len(entries) + place)[counts]
        E = self.b.shape[-1]
        flat = sums(self.b).new_zeros(self.rows * len(entries), E).index_add_(0, target, sums(self.b[counts]))
        return flat.view(self.rows, len(entries), E)


@dataclass(frozen=True)
class ContractedUse(Use):
    """A use that is known by its dots alone: being linear in D, they have G_i as their derivative along it."""

    contract: Callable[[Tensor], Tensor]
    """D (K, *shape) -> (rows, K), differentiable."""
    shape: tuple[int, ...]
    """Of the parameter."""
    like: Tensor
    """Any tensor of the layer, for its device and dtype."""
    rows: int

    def dots(self, D: Tensor) -> Tensor:
        """As given."""
        return self.contract(D)

    def gradient(self, weights: Tensor) -> Tensor:
        """By the derivative of the weighted dots, all rows' cost whatever their weights."""
        with torch.enable_grad():
            D = sums(self.like).new_zeros(1, *self.shape).requires_grad_()
            weighted = self.contract(D)[:, 0] @ weights.to(D)
        return torch.autograd.grad(weighted, D)[0][0]


@dataclass(frozen=True)
class RowsUse(Use):
    """A use of some of the parameter's rows, as of the part of a stacked matrix."""

    use: Use
    start: int
    stop: int
    entries: int
    """The rows that the parameter has."""

    @property
    def rows(self) -> int:  # type: ignore[override]
        """Those of the use."""
        return self.use.rows

    def dots(self, D: Tensor) -> Tensor:
        """With these rows of the directions."""
        return self.use.dots(D[:, self.start : self.stop])

    def gradient(self, weights: Tensor) -> Tensor:
        """Zero in the other rows."""
        of_rows = self.use.gradient(weights)
        gradient = of_rows.new_zeros(self.entries, *of_rows.shape[1:])
        gradient[self.start : self.stop] = of_rows
        return gradient


@torch.no_grad()
def accumulate(kept: Kept, weights: Tensor) -> None:
    """Adds sum_i weights_i G_i of every use to its parameter's .grad; the uses are used up, and let go one by one.

    Args:
        kept: The uses of one backward.
        weights: (rows,) floating point, on the CPU.

    Cost:
        The weight gradients' share of a backward over the rows of weight other than 0.
    """
    while kept:
        parameter, use = kept.pop()
        gradient = use.gradient(weights).view_as(parameter).to(parameter.dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


@torch.no_grad()
def gram(kept: Kept, scale: Callable[[nn.Parameter], Scale]) -> Tensor:
    """(B, B) float64, on the CPU: <P * g_i, P * g_j> over all parameters kept, cross terms of uses included.

    A parameter's gradients are formed a few entries at a time, each once, and multiplied with each other. Where there
    are so few positions that products of tokens take less, and P is a number, it is grad_gram's.

    Args:
        kept: The uses of one backward over samples, at least one.
        scale: parameter -> P.

    Raises:
        ValueError: The rows are documents.

    Cost:
        2 B (T + B) FLOPs per element of a parameter at most: with T positions much above B samples, the weight
        gradients' share of a backward.
    """
    uses: dict[nn.Parameter, list[Use]] = {}
    for parameter, use in kept:
        uses.setdefault(parameter, []).append(use)
    return torch.stack([_gram_of(p, each, scale(p)).double().cpu() for p, each in uses.items()]).sum(0)


def _gram_of(parameter: nn.Parameter, uses: list[Use], scale: Scale) -> Tensor:
    first = uses[0]
    if len(uses) == 1 and isinstance(first, MatrixUse) and isinstance(scale, float) and first.has_few_tokens:
        gram: Tensor = _torch.call("grad_gram", first.a, first.b, None, None, False, "auto")
        return gram * scale**2
    at_once = max(1, AT_ONCE * parameter.shape[0] // (first.rows * parameter.numel()))
    parts: list[Entries] = [slice(i, min(i + at_once, len(parameter))) for i in range(0, len(parameter), at_once)]
    tables = [use.ids.flatten() for use in uses if isinstance(use, TableUse)]
    if len(tables) == len(uses):
        parts = list(torch.cat(tables).unique().split(at_once))  # type: ignore[no-untyped-call]
    total = torch.zeros((), device=parameter.device)
    for some in parts:
        gradients = sum((use.part(some) for use in uses[1:]), start=first.part(some)).flatten(1)
        total = total + _products(gradients * scale[some].flatten() if isinstance(scale, Tensor) else gradients)
    return total if isinstance(scale, Tensor) else total * scale**2


def _products(x: Tensor) -> Tensor:
    """x x^T, of few rows and many columns: by blocks of columns, for a matrix product makes little of such a shape."""
    whole = x.shape[1] // COLUMNS * COLUMNS
    blocks, rest = x[:, :whole].view(len(x), -1, COLUMNS).transpose(0, 1), x[:, whole:]
    with exact(x):
        return torch.bmm(blocks, blocks.mT).sum(0) + rest @ rest.T


def by_row(parts: Tensor, segments: Tensor | None, rows: int) -> Tensor:
    """What positions have, (B T, ...), added up by document; what samples have as it is."""
    if segments is None:
        return parts
    target = segments.reshape(-1).long()
    # Positions of no document go to a row that is cut off: no mask, whose size would depend on the data.
    summed = parts.new_zeros(rows + 1, *parts.shape[1:]).index_add(0, torch.where(target < 0, rows, target), parts)
    return summed[:rows]


def exact(x: Tensor) -> torch.autocast:
    """Keeps autocast, inside which backward may have been called, from rounding products to 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


def sums(x: Tensor) -> Tensor:
    """A tensor in the dtype that sums over it are kept in."""
    return x if x.dtype == torch.float64 else x.float()


def _chosen(weights: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The samples that count, (n,), and the weights of their positions, (n, T), or of themselves, (n, 1)."""
    factors = weights[:, None]
    if segments is not None:
        factors = torch.cat([weights, weights.new_zeros(1)])[segments.cpu().long().clamp_min(-1)]
    chosen = factors.any(1).nonzero()[:, 0]
    return chosen, factors[chosen]


def _need_samples(segments: Tensor | None) -> None:
    if segments is not None:
        raise ValueError("gram: expected rows that are samples, got documents")
