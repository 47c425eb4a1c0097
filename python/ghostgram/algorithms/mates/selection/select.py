"""Selection: a temperature-controlled draw without replacement from the scored pool, within a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram.algorithms.mates.selection import ids as id_sets
from ghostgram.algorithms.mates.selection import streams
from ghostgram.algorithms.mates.selection.candidates import NOISE, Candidates, Drawn, Keys, draw, locate
from ghostgram.algorithms.mates.selection.ledger import Ledger
from ghostgram.algorithms.mates.selection.plan import Plan
from ghostgram.algorithms.mates.selection.quotas import Bounds, Quotas, bounds, choose, may_follow
from ghostgram.algorithms.mates.selection.scores import UNKNOWN, Scores
from ghostgram.algorithms.mates.selection.survey import STANDARDISE, Survey, survey

I64 = NDArray[np.int64]


def select(
    scores: Iterable[Any] | str | Path,
    *,
    tokens: int | None = None,
    docs: int | None = None,
    ratio: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    stage: int = 0,
    ledger: Ledger | None = None,
    quotas: Quotas | None = None,
    one_per: str | None = None,
    standardise: str = "pool",
    noise: str = "gumbel",
    combine: str | Mapping[str, float] = "sum",
) -> Plan:
    r"""The documents that the next stage trains on: the largest keys that the budget lets through.

        key_x = z_x / temperature + G_x,    z_x = (s_x - mu) / sigma

    G is standard Gumbel noise of (first 8 bytes of the document's id, seed, stage), so the selection is a draw without
    replacement from softmax(z / temperature): Plackett-Luce. Ties go to the smaller id. The plan is a function of the
    documents alone: their order, their shards and the number of threads cannot change a bit of it, `shard` and `row`
    apart. The training order comes from a stream of its own, never from the key.

    Args:
        scores: Score shards: paths of parquet files (or URIs that fsspec knows), tables or record batches of pyarrow,
            with the columns doc_id fixed_size_binary(16), n_tokens (integers, null where unknown), z_<reference>
            (floats, higher is better) and, if there are domains, domain (string). Read three times, or more often where
            it cannot be known beforehand how many documents a budget holds.
        tokens: The budget: the longest beginning, by falling key, of no more tokens. None is skipped to fill it up.
        docs: Or this many documents.
        ratio: Or this share of the eligible ones, from 0 to 1, rounded down.
        temperature: From 1e-300 to 1e300; 0 takes the best scores without noise.
        seed: Of both streams, at least 0.
        stage: At least 0; each has its own noise.
        ledger: Passes over what earlier stages have used up. The plan is not entered: `ledger.plan(plan, stage)` does.
        quotas: Shares of the budget by domain: a number is met exactly, (least, most) bounds it. Each least share is
            filled by falling key, then the rest goes down the keys, passing over domains that have their most.
        one_per: A column of near-duplicate clusters, of each of which only the largest key stays. Nulls are no cluster.
        standardise: "pool": mu and sigma of all eligible documents; "domain": of those of the document's domain;
            "none": 0 and 1.
        noise: "gumbel", or "mates_release": the noise is subtracted, as in the release of the paper, which is no
            Plackett-Luce draw and greedier. That release also has standardise="none", temperature=0.5, ratio=0.2.
        combine: How references make one score: "sum", "min", the name of one, or weights by name.

    Returns:
        The plan. Its report says what was chosen from what: documents, tokens and domains of both, the mean z (in
        deviations of the pool's scores, whatever `standardise`), the overlap with the best scores, the temperature on
        standardised scores, the repeats of chosen documents, and what quotas or budget lack.

    Raises:
        TypeError: A shard is neither a path nor a table.
        ValueError: An argument is out of its range; a column is missing; a score is not finite; a chosen document
            comes with two scores, lengths or clusters; or two documents' ids have equal first 8 bytes.

    Cost:
        Memory of 350 to 500 bytes for each document chosen, 40 for each that the ledger holds, and some MiB. With
        quotas and `one_per` at once, more: candidates are then kept from the whole pool until every share is filled.

    Source:
        arXiv 2406.06046, section 3; Gumbel-top-k is arXiv 1903.06059.
    """
    _check_options(tokens, docs, ratio, temperature, seed, stage, standardise, noise)
    spent = ledger.spent(stage) if ledger else None
    pool = Scores(scores, combine, one_per, spent, counted=tokens is not None)
    seen = survey(pool, standardise)
    limits = bounds(quotas, seen.domains, _budget(tokens, docs, ratio, int(seen.rows.sum())))
    keys = Keys(float(temperature), noise, streams.stream(seed, stage, "gumbel"))

    lists = _lists(limits, one_per is not None)
    sizes = _first_sizes(limits, seen, lists, tokens is not None, one_per is not None)
    while True:
        drawn = draw(pool, seen, keys, lists, sizes)
        found, settled = locate(pool, drawn, lists, seen)
        if one_per:
            found = found.taken(np.sort(np.unique(found.clusters, return_index=True)[1]))
        weights = found.tokens if tokens is not None else np.ones(len(found.keys), np.int64)
        choice = choose(weights, found.domains, limits)
        short = np.zeros(len(sizes), bool)  # lists of which more could be chosen than were drawn
        for number in range(len(sizes)):
            own = lists == number
            end = int(np.flatnonzero(found.lists == number).max(initial=-1)) + 1
            follow = may_follow(choice, found.domains, end, limits) & (settled < seen.rows)
            short[number] = (follow & own).any()
        if not short.any():
            break
        rows = np.bincount(lists, seen.rows, minlength=len(sizes)).astype(np.int64)
        sizes = np.where(short, np.minimum(2 * sizes + 64, rows), sizes)

    chosen = found.taken(choice.chosen)
    order = streams.shuffled(np.ascontiguousarray(chosen.ids[:, 0]), streams.stream(seed, stage, "order"))
    chosen = chosen.taken(order)
    options = {"seed": seed, "stage": stage, "temperature": float(temperature), "noise": noise}
    options |= {"standardise": standardise, "one_per": one_per}
    options |= {"combine": combine if isinstance(combine, str) else dict(combine)}
    options |= {"tokens": tokens, "docs": docs, "ratio": ratio, "spent": len(spent) if spent else 0}
    return Plan(_table(chosen, seen), options | _report(chosen, drawn, seen, limits, options, tokens is not None))


def _check_options(
    tokens: int | None, docs: int | None, ratio: float | None, temperature: float, seed: int, stage: int,
    standardise: str, noise: str,
) -> None:  # fmt: skip
    budgets = {"tokens": tokens, "docs": docs, "ratio": ratio}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"tokens, docs, ratio: expected exactly one of them, got {given or 'none'}")
    for name, value in given.items():
        if value < 0 or (name == "ratio" and not value <= 1):
            raise ValueError(f"{name}: expected at least 0{' and at most 1' if name == 'ratio' else ''}, got {value}")
    if not (temperature == 0 or 1e-300 <= temperature <= 1e300):
        raise ValueError(f"temperature: expected 0, or from 1e-300 to 1e300, got {temperature}")
    for name, number in (("seed", seed), ("stage", stage)):
        if number < 0:
            raise ValueError(f"{name}: expected at least 0, got {number}")
    for name, word, words in (("standardise", standardise, STANDARDISE), ("noise", noise, NOISE)):
        if word not in words:
            raise ValueError(f"{name}: expected one of {words}, got {word!r}")


def _budget(tokens: int | None, docs: int | None, ratio: float | None, eligible: int) -> int:
    """In tokens or documents."""
    if ratio is not None:
        return math.floor(Fraction(str(ratio)) * eligible)  # as it is written: 0.2 is a fifth
    return int(docs if docs is not None else tokens or 0)


def _lists(limits: Bounds, clustered: bool) -> I64:
    """The list that each domain's candidates are kept in: one each for domains with bounds, one for all others.

    A cluster may have members in several domains, and which of them has the largest key can be told only where all
    candidates down to one key are known: clusters need one list.
    """
    named = limits.named & (not clustered)
    others = int((~named).any())
    return np.where(named, np.cumsum(named) - 1 + others, 0)


def _first_sizes(limits: Bounds, seen: Survey, lists: I64, in_tokens: bool, clustered: bool) -> I64:
    """How many candidates of each list should do; exactly what is needed where that is known."""
    count = int(lists.max(initial=0)) + 1
    held = seen.tokens if in_tokens else seen.rows
    free = np.where(limits.most > limits.least, held, 0)
    rest = max(limits.budget - int(limits.least.sum()), 0)
    share = limits.least + rest * free / max(int(free.sum()), 1)
    expected = np.bincount(lists, np.minimum(share, limits.most), minlength=count)
    rows = np.bincount(lists, seen.rows, minlength=count)
    mean = np.bincount(lists, held, minlength=count) / np.maximum(rows, 1)
    exact = not in_tokens and not clustered and (count == 1 or bool((limits.least == limits.most).all()))
    needed = np.ceil(expected / np.maximum(mean, 1) * (1 if exact else 1.1)) + (0 if exact else 64)
    sizes: I64 = np.minimum(needed, rows).astype(np.int64)
    return sizes


def _table(chosen: Candidates, seen: Survey) -> Any:
    import pyarrow as pa

    names = pa.array([name or None for name in seen.domains], pa.string())
    return pa.table(
        {
            "order": pa.array(np.arange(len(chosen.keys)), pa.int64()),
            "doc_id": id_sets.binary(chosen.ids),
            "domain": names.take(pa.array(chosen.domains)),
            "n_tokens": pa.array(chosen.tokens, mask=chosen.tokens == UNKNOWN),
            "key": pa.array(chosen.keys),
            "shard": pa.array(chosen.shards.astype(np.int32)),
            "row": pa.array(chosen.rows),
        }
    )


def _report(
    chosen: Candidates, drawn: Drawn, seen: Survey, limits: Bounds, options: Mapping[str, Any], in_tokens: bool
) -> dict[str, Any]:
    n, domains = len(chosen.keys), len(seen.domains)
    docs = np.bincount(chosen.domains, minlength=domains)
    tokens = np.bincount(chosen.domains, np.maximum(chosen.tokens, 0), minlength=domains).astype(np.int64)
    used = tokens if in_tokens else docs
    std = seen.pool.std
    best = id_sets.Lookup(drawn.by_score[:n]).find(np.ascontiguousarray(chosen.ids[:, 0]))[0]
    table = {
        name: {
            "pool_documents": int(seen.rows[d]),
            "pool_tokens": int(seen.tokens[d]),
            "documents": int(docs[d]),
            "tokens": int(tokens[d]),
            "least": int(limits.least[d]),
            "most": int(limits.most[d]),
            "lacking": max(int(limits.least[d] - used[d]), 0),
        }
        for d, name in enumerate(seen.domains)
    }
    eligible, pool_tokens = int(seen.rows.sum()), int(seen.tokens.sum())
    temperature = options["temperature"]
    return {
        "documents": n,
        "token_count": int(tokens.sum()),
        "pool_documents": eligible,
        "pool_tokens": pool_tokens,
        "share_of_documents": n / eligible if eligible else 0.0,
        "share_of_tokens": int(tokens.sum()) / pool_tokens if pool_tokens else 0.0,
        "score_mean": seen.pool.mean,
        "score_std": std,
        "mean_z": float(((chosen.scores - seen.pool.mean) / std).mean()) if n and std else 0.0,
        "effective_temperature": temperature / (std or 1.0) if options["standardise"] == "none" else temperature,
        "overlap_with_best": len(best) / n if n else 0.0,
        "repeats": int(chosen.repeats.sum()),
        "budget": limits.budget,
        "unused": limits.budget - int(used.sum()),
        "domains": table,
    }
