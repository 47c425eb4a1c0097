"""Norms and dots of whole per-sample gradients, from what one backward kept: all uses of a parameter are one gradient.

Dots add up over uses; norms do not. Uses of one kind are therefore laid end to end, as if the layer had seen all their
positions at once, and of the two kinds that a tied table has, lookups and a product, the cross term is taken by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ghostgram.ops import _torch
from ghostgram.ops.grad_norms import grad_norms
from ghostgram.taps.conv import ConvolutionUse
from ghostgram.taps.sharding import whole
from ghostgram.taps.uses import DenseUse, Kept, MatrixUse, TableUse, Use, exact, sums

Uses = dict[nn.Parameter, list[Use]]
"""parameter -> its uses, at most one of each kind that can be laid end to end."""


class Statistics(NamedTuple):
    """What `statistics` returns, on the CPU."""

    squares: Tensor
    """(rows,) float64: squared norm of each row's gradient over all parameters kept."""
    dots: Tensor
    """(rows, K) float64: inner products of each row's gradient with the directions."""


def uses_of(kept: Kept) -> Uses:
    """The uses of each parameter, those of one kind joined; rows must be samples."""
    found: Uses = {}
    for parameter, use in kept:
        if getattr(use, "segments", None) is not None:
            raise ValueError("statistics: expected rows that are samples, got documents")
        found.setdefault(parameter, []).append(use)
    return {p: _joined(uses) if len(uses) > 1 else uses for p, uses in found.items()}


@torch.no_grad()
def statistics(uses: Uses, directions: Mapping[nn.Parameter, Tensor], count: int) -> Statistics:
    """Squared norms over all parameters, and dots with K directions, from one pass over the uses.

    Args:
        uses: From `uses_of`, at least one.
        directions: parameter -> (K, *shape), zero for a parameter that is not in it.
        count: K.

    Returns:
        `Statistics`. Exact for tied and reused weights: cross terms of a parameter's uses are included.

    Cost:
        A product's tiles (2 B T d p FLOPs) serve its norms and its dots; a parameter without directions takes the
        cheaper way of `grad_norms`; the cross term of a tied table takes 2 B T^2 d. Layers known by their dots alone
        form one sample's gradient after another.
    """
    found = [_statistics(each, whole(directions.get(parameter))) for parameter, each in uses.items()]
    squares = _summed([squares for squares, _ in found])
    dots = [dots for _, dots in found if dots is not None]
    return Statistics(squares, _summed(dots) if dots else squares.new_zeros(len(squares), count))


def _summed(parts: list[Tensor]) -> Tensor:
    """Their sum in float64 on the CPU, by one transfer."""
    return torch.stack([part.double().to(parts[0].device) for part in parts]).sum(0).cpu()


@torch.no_grad()
def gradients_at(uses: Sequence[Use], entries: Tensor) -> Tensor:
    """Each row's gradient of one parameter at entries of its own, as of a table at the tokens of a text.

    Args:
        uses: The parameter's, from `uses_of`.
        entries: (rows, n) entries along the parameter's first axis, ascending, and behind them the number of entries,
            where the result is zero; from `distinct`.

    Returns:
        (rows, n, ...) in the dtype of sums.

    Cost:
        2 rows T n d FLOPs for a product (B, T, d), a scatter-add for lookups.
    """
    return sum((_at(use, entries) for use in uses[1:]), start=_at(uses[0], entries))


def distinct(ids: Tensor, entries: int, counted: Tensor | None = None) -> Tensor:
    """(rows, n) the distinct ids of each row, ascending and filled up with `entries`.

    Args:
        ids: (rows, T) at least one row.
        entries: How many entries ids are of.
        counted: (rows, T) bool: which ids count; None for all.
    """
    ids = (ids if counted is None else ids.masked_fill(~counted, entries)).sort(1).values
    first = ids != torch.cat([ids.new_full((len(ids), 1), -1), ids[:, :-1]], 1)
    ids = ids.masked_fill(~first, entries).sort(1).values
    return ids[:, : max(1, int((ids < entries).sum(1).max()))].contiguous()


def _at(use: Use, entries: Tensor) -> Tensor:
    if isinstance(use, TableUse):
        b, (rows, n) = sums(use.b), entries.shape
        place = torch.searchsorted(entries, use.ids.to(entries).contiguous()).clamp_max(n - 1)
        counts = (entries.gather(1, place) == use.ids) & (use.ids != use.padding)
        target = (torch.arange(rows, device=place.device)[:, None] * n + place)[counts]
        return b.new_zeros(rows * n, b.shape[-1]).index_add_(0, target, b[counts]).view(rows, n, -1)
    if isinstance(use, MatrixUse):
        inside = entries < use.b.shape[-1]
        columns = entries.where(inside, 0)[:, None].expand(-1, use.b.shape[1], -1)
        with exact(use.a):
            return torch.bmm(sums(use.b.gather(2, columns)).mT, sums(use.a)) * inside[..., None]
    if isinstance(use, DenseUse):
        each = list(sums(use.gradients))
    else:
        each = [use.gradient(one) for one in torch.eye(use.rows)]
    padded = [torch.cat([g, torch.zeros_like(g[:1])]) for g in each]
    return torch.stack([g[mine] for g, mine in zip(padded, entries, strict=True)])


def _statistics(uses: list[Use], D: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(rows,) squared norms and (rows, K) dots of one parameter's gradients."""
    match uses:
        case [MatrixUse(a=a, b=b)] if D is None:
            return grad_norms(a, b).square(), None
        case [MatrixUse(a=a, b=b)]:
            return _pair(_torch.call("grad_stats", a, b, D, False, True, "auto")[1:], D)
        case [ConvolutionUse() as use] if D is None and (squares := use.squares()) is not None:
            return squares, None
        case [TableUse(ids=ids, b=b, padding=padding)]:
            return _pair(_torch.call("embedding_stats", ids, b, D, padding, True, "auto"), D)
        case [DenseUse(gradients=gradients) as use]:
            return sums(gradients).flatten(1).square().sum(1), None if D is None else use.dots(D)
        case [TableUse() as table, MatrixUse() as product] | [MatrixUse() as product, TableUse() as table]:
            both = [_statistics([use], D) for use in (table, product)]
            squares = both[0][0] + both[1][0] + 2 * _cross(table, product)
            dots = [each for _, each in both if each is not None]
            return squares.clamp_min(0), dots[0] + dots[1] if dots else None
    of_rows = []
    for one in torch.eye(uses[0].rows):
        gradient = sum((use.gradient(one) for use in uses[1:]), start=uses[0].gradient(one)).flatten()
        with exact(gradient):
            of_rows.append((gradient.square().sum(), None if D is None else D.flatten(1).to(gradient) @ gradient))
    squares = torch.stack([square for square, _ in of_rows])
    return squares, None if D is None else torch.stack([dots for _, dots in of_rows if dots is not None])


def _pair(stats: tuple[Tensor, Tensor], D: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return stats[0], None if D is None else stats[1]


def _cross(table: TableUse, product: MatrixUse) -> Tensor:
    """(rows,) inner products of the gradients that a table's lookups and its product give each sample.

    Row v of the product's gradient is sum_s b_s[v] a_s, of the lookups' the sum of the c_t looked up at v; so it is
    sum_ts (c_t . a_s) b_s[ids_t].
    """
    c, a, b = sums(table.b), sums(product.a), product.b
    with exact(a):
        between = torch.bmm(a, c.mT.to(a))
    ids = table.ids.long().clamp_min(0)
    looked_up = sums(b.gather(2, ids[:, None].expand(-1, b.shape[1], -1)))
    return (between * looked_up).masked_fill((table.ids == table.padding)[:, None], 0.0).flatten(1).sum(1)


def _joined(uses: list[Use]) -> list[Use]:
    """Products, lookups and dense gradients each as one use; others as they are."""
    products = [use for use in uses if type(use) is MatrixUse]
    lookups = [use for use in uses if type(use) is TableUse]
    dense = [use for use in uses if type(use) is DenseUse]
    joined: list[Use] = [use for use in uses if type(use) not in (MatrixUse, TableUse, DenseUse)]
    if products:
        a, b = (torch.cat([getattr(use, name) for use in products], 1) for name in "ab")
        joined.append(MatrixUse(a, b, None, products[0].rows))
    for padding in dict.fromkeys(use.padding for use in lookups):  # two tables tied may differ in it
        same = [use for use in lookups if use.padding == padding]
        ids, b = torch.cat([use.ids for use in same], 1), torch.cat([use.b for use in same], 1)
        joined.append(TableUse(ids, b, same[0].entries, padding, None, same[0].rows))
    if dense:
        joined.append(DenseUse(sum((use.gradients for use in dense[1:]), start=dense[0].gradients)))
    return joined
