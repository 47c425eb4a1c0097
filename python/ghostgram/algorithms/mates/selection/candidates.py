"""The best documents of a pool by key: drawn in one reading, found again with their rows in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram.algorithms.mates.selection import ids as id_sets
from ghostgram.algorithms.mates.selection import streams
from ghostgram.algorithms.mates.selection.scores import Scores
from ghostgram.algorithms.mates.selection.survey import Survey
from ghostgram.ops.gumbel_topk import GumbelTopK, UnequalScores

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
Bool = NDArray[np.bool_]

NOISE = ("gumbel", "mates_release")


@dataclass(frozen=True)
class Keys:
    """How a document's key comes from its standardised score: z / temperature, plus or minus Gumbel noise."""

    temperature: float
    noise: str
    stream: int

    def reservoir(self, size: int) -> GumbelTopK:
        """An empty reservoir for `size` documents, to be fed by `feed`."""
        return GumbelTopK(size, self.stream, self.temperature if self.noise == "gumbel" else 0.0)

    def feed(self, z: F64, ids: U64) -> F64:
        """What a reservoir takes as scores: z, or in the release's mode the finished keys."""
        if self.noise == "gumbel" or self.temperature == 0:
            return z
        released: F64 = z / self.temperature - streams.gumbel(ids, self.stream)
        return released


@dataclass(frozen=True)
class Drawn:
    """Documents by first words of ids and keys, list by list, and the best by score alone."""

    ids: U64
    keys: F64
    lists: I64
    by_score: U64  # best first


def draw(pool: Scores, survey: Survey, keys: Keys, list_of: I64, sizes: I64) -> Drawn:
    """The `sizes[l]` largest keys of every list l: of the documents whose domains `list_of` sends there.

    Args:
        pool: Read once.
        survey: Of this pool.
        keys: The rule.
        list_of: (domains,) numbers of lists.
        sizes: (lists,)

    Raises:
        ValueError: One document has two scores, or two documents share the first 8 bytes of their ids.

    Cost:
        Memory of about 80 bytes for each of the documents kept, twice.
    """
    tops = [keys.reservoir(size) for size in sizes.tolist()]
    by_score = GumbelTopK(int(sizes.sum()), 0, 0.0)
    for batch in pool.batches("ids", "scores", "domains"):
        z, ids = survey.z(batch), np.ascontiguousarray(batch.ids[:, 0])
        by_score.update(z, ids)
        fed = keys.feed(z, ids)
        if len(tops) == 1:
            tops[0].update(fed, ids)
            continue
        lists = list_of[batch.domains]
        order = np.argsort(lists, kind="stable")
        ends = np.searchsorted(lists[order], np.arange(len(tops) + 1))
        for top, start, stop in zip(tops, ends[:-1], ends[1:], strict=True):
            if start < stop:
                top.update(fed[order[start:stop]], ids[order[start:stop]])
    try:
        kept = [top.result() for top in tops]
        best = by_score.result()[0]
    except UnequalScores as fault:
        _check(*_gather(pool, np.array([fault.id]).view(np.uint64)), survey)  # reads on to say which documents
        raise
    return Drawn(
        np.concatenate([ids for ids, _ in kept]).astype(np.uint64),
        np.concatenate([key for _, key in kept]),
        np.repeat(np.arange(len(kept)), [len(ids) for ids, _ in kept]),
        best.astype(np.uint64),
    )


@dataclass(frozen=True)
class Candidates:
    """Documents by falling key, equal keys by the first word of the id; every field is (n, ...)."""

    ids: U64
    keys: F64
    scores: F64
    tokens: I64
    domains: I64
    clusters: I64  # different numbers for documents without one
    lists: I64
    shards: I64
    rows: I64
    repeats: I64  # further rows of the same document

    def taken(self, which: NDArray[Any]) -> Candidates:
        """Some of them, by mask or positions."""
        return Candidates(*(getattr(self, field.name)[which] for field in fields(self)))


def locate(pool: Scores, drawn: Drawn, list_of: I64, survey: Survey) -> tuple[Candidates, I64]:
    """The rows of drawn documents, and how many rows of each domain they are.

    A document that several domains hold belongs to the first of them by name, and is a candidate in its list alone.

    Raises:
        ValueError: One document has two scores, lengths or clusters, or, where scores are standardised by domain, two
            domains; or two documents share the first 8 bytes of their ids.
    """
    lookup, hits = _gather(pool, drawn.ids)
    documents = _check(lookup, hits, survey)
    first = np.flatnonzero(np.diff(hits.place, prepend=-1))
    place = np.searchsorted(lookup.ids, drawn.ids)
    at_home = drawn.lists == list_of[documents[place]]
    known = np.zeros(len(first), bool)
    known[place[at_home]] = True
    settled = known[hits.place] | (documents[hits.place] != hits.domains)
    rows = np.bincount(hits.domains[settled], minlength=len(list_of))

    place, keys, lists = place[at_home], drawn.keys[at_home], drawn.lists[at_home]
    order = np.lexsort((drawn.ids[at_home], -keys))
    place, row = place[order], first[place[order]]
    clusters = hits.clusters[row]
    clusters = np.where(clusters < 0, -1 - np.arange(len(row)), clusters)
    counts = np.diff(first, append=len(hits.place))
    return Candidates(
        np.stack([lookup.ids[place], hits.second[row]], axis=1),
        *(keys[order], hits.scores[row], hits.tokens[row], documents[place], clusters, lists[order]),
        *(hits.shards[row], hits.rows[row], counts[place] - 1),
    ), rows


@dataclass(frozen=True)
class _Hits:
    """Rows of the pool whose documents are looked for, sorted by document, and for one by shard and row."""

    place: I64  # of the first word of the id among those looked for
    second: U64
    scores: F64
    tokens: I64
    domains: I64
    clusters: I64  # -1 for none
    shards: I64
    rows: I64


def _gather(pool: Scores, ids: U64) -> tuple[id_sets.Lookup, _Hits]:
    lookup = id_sets.Lookup(ids)
    pieces: list[tuple[Any, ...]] = []
    clusters: list[Any] = []
    for batch in pool.batches("ids", "scores", "tokens", "domains", "clusters"):
        at, place = lookup.find(batch.ids[:, 0])
        held = batch.ids[at, 1], batch.scores[at], batch.tokens[at], batch.domains[at].astype(np.int64)
        pieces.append((place, *held, np.full(len(at), batch.shard), batch.rows[at]))
        if batch.clusters is not None:
            clusters.append(batch.clusters.take(at))
    if not pieces:
        kinds = (np.int64, np.uint64, np.float64, np.int64, np.int64, np.int64, np.int64)
        pieces = [tuple(np.zeros(0, kind) for kind in kinds)]
    columns = [np.concatenate(column) for column in zip(*pieces, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    place, second, scores, tokens, domains, shards, rows = (column[order] for column in columns)
    codes = _codes(clusters)[order] if clusters else np.full(len(order), -1)
    return lookup, _Hits(place, second, scores, tokens, domains, codes, shards, rows)


def _codes(columns: Sequence[Any]) -> I64:
    """Equal numbers for equal values, -1 for nulls."""
    import pyarrow as pa

    plain = [column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in columns]
    coded = pa.concat_arrays(plain).dictionary_encode()
    codes: I64 = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes


def _check(lookup: id_sets.Lookup, hits: _Hits, survey: Survey) -> I64:
    """Refuses rows of one document that differ; the domain of every document that was looked for."""
    first = np.flatnonzero(np.diff(hits.place, prepend=-1))
    of_first = first[hits.place]

    def refuse(what: str, values: NDArray[Any]) -> None:
        unequal = values != values[of_first]
        if unequal.any():
            row = int(np.argmax(unequal))
            one, two = sorted([values[of_first[row]].item(), values[row].item()])
            raise ValueError(f"doc_id: expected one {what} for each document, got {one} and {two} for {name(row)}")

    def name(row: int) -> str:
        return id_sets.name_of(np.array([lookup.ids[hits.place[row]], hits.second[row]]))

    strangers = np.flatnonzero(hits.second != hits.second[of_first])
    if len(strangers):
        one, two = sorted([name(of_first[strangers[0]]), name(strangers[0])])
        raise ValueError(
            f"doc_id: expected ids that differ in their first 8 bytes, got {one} and {two}: leave one out of the pool"
        )
    refuse("score", hits.scores)
    refuse("n_tokens", hits.tokens)
    refuse("cluster (as numbered here)", hits.clusters)
    if len({*zip(survey.means.tolist(), survey.stds.tolist(), strict=True)}) > 1:
        refuse("domain", np.array(survey.domains)[hits.domains])
    return np.minimum.reduceat(hits.domains, first) if len(first) else np.zeros(0, np.int64)
