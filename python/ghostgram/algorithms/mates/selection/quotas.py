"""Which documents a budget and shares of domains let through, going down their keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
Bool = NDArray[np.bool_]

Quotas = Mapping[str, "float | tuple[float, float]"]
"""Share of the budget by domain: exact, or (least, most). A domain that is not named has (0, 1)."""


@dataclass(frozen=True)
class Bounds:
    """What each domain gets at least and at most of the budget, in documents or tokens."""

    budget: int
    least: I64  # (domains,)
    most: I64
    named: Bool


def bounds(quotas: Quotas | None, domains: Sequence[str], budget: int) -> Bounds:
    """Shares as whole numbers: least ones rounded by largest remainder, most ones down but to the least at least.

    Args:
        quotas: Shares by domain.
        domains: Names of all domains.
        budget: Documents or tokens in all.

    Raises:
        ValueError: A domain is unknown, a share is outside [0, 1], a least share is above the most, or the least ones
            add up to more than 1.
    """
    shares = {name: (x, x) if isinstance(x, (int, float)) else tuple(x) for name, x in (quotas or {}).items()}
    for name, (low, high) in shares.items():
        if name not in domains:
            raise ValueError(f"quotas: expected domains of the pool, {list(domains)}, got {name!r}")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"quotas: expected 0 <= least <= most <= 1, got ({low}, {high}) for {name!r}")
    exact = {name: (Fraction(str(low)), Fraction(str(high))) for name, (low, high) in shares.items()}  # as written
    total = sum((low for low, _ in exact.values()), Fraction())
    if total > 1 + Fraction(1, 10**9):
        raise ValueError(f"quotas: expected least shares that add up to at most 1, got {float(total)}")
    least, most = np.zeros(len(domains), np.int64), np.full(len(domains), budget, np.int64)
    position = {name: number for number, name in enumerate(domains)}
    remainders = {}
    for name, (lower, upper) in exact.items():
        least[position[name]], most[position[name]] = math.floor(lower * budget), math.floor(upper * budget)
        remainders[name] = lower * budget - math.floor(lower * budget)
    left = min(math.floor(total * budget), budget) - int(least.sum())
    for name in sorted(remainders, key=lambda name: (-remainders[name], name))[:left]:
        least[position[name]] += remainders[name] > 0
    named = np.array([name in shares for name in domains], bool)
    return Bounds(budget, least, np.maximum(least, most), named)


@dataclass(frozen=True)
class Choice:
    """Of documents by falling key: which are chosen, and how far each budget is used up on the way down."""

    chosen: Bool  # (n,)
    within: I64  # (n,) what the document's domain holds down to it
    beyond: I64  # (n,) what is allowed beyond the least shares, of all domains, down to here
    rest: int  # of the budget, beyond the least shares


def choose(weights: I64, domains: NDArray[np.integer], limits: Bounds) -> Choice:
    """Fills the least share of every domain in the order of keys, then goes down the rest.

    A domain's documents are taken from its best on, none is skipped: the longest beginning that fits its least share,
    then more of it up to its most. Beyond the least shares, the budget ends at the first document that does not fit:
    going on to shorter ones would favour them. What a least share lacks goes to the rest; what an exact share lacks
    stays unused.

    Args:
        weights: (n,) tokens of every document, or ones; at least 1.
        domains: (n,) numbers.
        limits: Of the domains.

    Cost:
        Two sums down the list and a sort by domain.
    """
    order = np.argsort(domains, kind="stable")
    sums = np.cumsum(weights[order])
    new = np.flatnonzero(np.diff(domains[order], prepend=-1))
    before = np.repeat(sums[new] - weights[order][new], np.diff(new, append=len(order)))
    within = np.empty(len(order), np.int64)
    within[order] = sums - before
    least = within <= limits.least[domains]
    allowed = ~least & (within <= limits.most[domains])
    beyond = np.cumsum(np.where(allowed, weights, 0))
    kept = np.where(limits.least == limits.most, limits.least, 0)  # an exact share is its domain's, filled or not
    np.maximum.at(kept, domains[least], within[least])
    rest = limits.budget - int(kept.sum())
    return Choice(least | (allowed & (beyond <= rest)), within, beyond, rest)


def may_follow(choice: Choice, domains: NDArray[np.integer], end: int, limits: Bounds) -> Bool:
    """(domains,) whether a document of this domain that comes after the first `end` ones could be chosen.

    It would weigh 1 at least. It cannot be chosen once its domain has its most, or has its least and the rest of the
    budget is used up.
    """
    held = np.zeros(len(limits.least), np.int64)
    np.maximum.at(held, domains[:end], choice.within[:end])
    used_up = bool(end) and int(choice.beyond[end - 1]) + 1 > choice.rest
    used_up = used_up or choice.rest < 1
    return (held + 1 <= limits.most) & ((held + 1 <= limits.least) | (not used_up))
