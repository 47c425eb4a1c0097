"""Whether cheap labels rank documents as real updates do, how sure that is, and what the real ones are worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ghostgram.algorithms.mates.labels.backend import Influence, LabelBackend
from ghostgram.algorithms.mates.labels.exact import ExactLabels
from ghostgram.algorithms.mates.stats import bootstrap_interval, pearson, spearman, top_overlap

F64 = NDArray[np.float64]

BEGIN, MOST = 256, 1024
"""Documents audited at first, and at most; they double in between."""
FEWEST = 16
"""Documents below which ranks say nothing."""
RHO = 0.95
"""Rank correlation with the exact labels that a backend must reach."""
SLACK = 0.02
"""How far below that the lower end of its interval may be."""
RELIABLE, NUMERIC = 0.9, 0.97
"""Reliability of the reference, and of the exact labels' arithmetic, below which the report says so."""
REPEATED = 64
"""Documents that are labelled again with wider arithmetic."""
SHARE = 0.2
"""The share of documents whose overlap is reported."""
RESAMPLES = 2000


class AuditError(RuntimeError):
    """No backend that may be used ranks documents as real updates do; `audit` holds what was found."""

    def __init__(self, audit: Audit) -> None:
        super().__init__(
            f"no backend reaches a rank correlation of {audit.bar:g} with the exact labels:\n{audit.table()}\n"
            'Label with backend="exact", enlarge the reference, or lower the bar by accept_rho='
        )
        self.audit = audit


@dataclass(frozen=True)
class Comparison:
    """One backend against the exact labels on one reference."""

    backend: str
    reference: str
    documents: int
    rho: float
    """Spearman's rank correlation."""
    low: float
    high: float
    """Its 95 % interval, by percentile bootstrap."""
    fisher_low: float
    fisher_high: float
    """The same by Fisher's z with variance (1 + rho^2 / 2) / (n - 3)."""
    pearson: float
    slope: float
    """Of the exact labels on the backend's: 1 where its values are right, not only its ranks."""
    overlap: float
    """The share of the exact labels' top fifth that is also the backend's."""


@dataclass(frozen=True)
class Worth:
    """What the exact labels on one reference are worth."""

    reference: str
    sd: float
    """Standard deviation of the influence over documents, nats per token."""
    null_gain: float
    halves: float
    """Spearman's correlation of the exact labels by two halves of the reference."""
    reliability: float
    """2 h / (1 + h): about the correlation with the labels of a fresh reference of this size. It bounds what any label
    says about the task behind the reference; no backend changes it."""
    numeric: float | None
    """Spearman's correlation with the same labels by wider arithmetic; None where that was not asked for."""
    drift: float | None
    """Spearman's correlation with what the previous influence model says; None without one."""


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    verdict: str
    """"pass": the first backend will do; "upgrade": a later one will; "refuse": none does."""
    backend: str | None
    """The backend that will do."""
    bar: float
    """The rank correlation that was asked for."""
    accept_rho: float | None
    """The caller's own bar, if it was given."""
    clipped: float
    """The share of documents whose gradient is clipped."""
    comparisons: list[Comparison]
    """Of every backend tried, in their order, with every reference."""
    worth: list[Worth]
    """By reference."""
    advice: list[str]
    exact: Influence = field(repr=False)
    """The exact labels of the audited documents."""

    @property
    def documents(self) -> int:
        """How many were labelled exactly."""
        return len(self.exact.values)

    @property
    def rho(self) -> float:
        """The lowest rank correlation, over references, of the backend that will do, or of the last one tried."""
        name = self.backend or self.comparisons[-1].backend
        return min((c.rho for c in self.comparisons if c.backend == name), default=1.0)

    def manifest(self) -> dict[str, Any]:
        """Everything but the labels, as JSON has it."""
        facts = {name: getattr(self, name) for name in ("verdict", "backend", "bar", "accept_rho", "clipped", "advice")}
        rows = {"comparisons": [asdict(c) for c in self.comparisons], "worth": [asdict(w) for w in self.worth]}
        return facts | {"documents": self.documents} | rows

    def table(self) -> str:
        """The comparisons and what the labels are worth, as lines of text."""
        rows = [("backend", "reference", "n", "rho", "95 %", "Fisher", "Pearson", "slope", "top fifth")]
        rows += [
            (c.backend, c.reference, str(c.documents), f"{c.rho:.3f}", f"{c.low:.3f}..{c.high:.3f}",
             f"{c.fisher_low:.3f}..{c.fisher_high:.3f}", f"{c.pearson:.3f}", f"{c.slope:.2f}", f"{c.overlap:.2f}")
            for c in self.comparisons
        ]  # fmt: skip
        worth: list[tuple[str, ...]] = [("reference", "sd", "null gain", "halves", "reliability", "numeric", "drift")]
        worth += [
            (w.reference, f"{w.sd:.2e}", f"{w.null_gain:+.2e}", f"{w.halves:.3f}", f"{w.reliability:.3f}",
             *("-" if x is None else f"{x:.3f}" for x in (w.numeric, w.drift)))
            for w in self.worth
        ]  # fmt: skip
        found = f"{self.documents} documents, {self.clipped:.0%} of them clipped; verdict: {self.verdict}"
        return "\n".join([_aligned(rows), _aligned(worth), found, *self.advice])


def audit(
    ids: Tensor,
    mask: Tensor,
    exact: ExactLabels,
    ladder: Iterable[LabelBackend],
    *,
    begin: int = BEGIN,
    most: int = MOST,
    accept_rho: float | None = None,
    wider: ExactLabels | None = None,
    previous: Callable[[int], ArrayLike] | None = None,
    seed: int = 0,
) -> Audit:
    """Compares backends with exact labels, one after another, until one will do.

    A backend passes where, on every reference, its rank correlation rho with the exact labels is at least 0.95 and the
    lower end of rho's interval at least 0.93. It fails where the upper end of an interval is below 0.95. In between the
    verdict is open and the documents are doubled; what is open with the most documents has failed.

    Args:
        ids: (n, T) int64 documents, as they come in an order that knows nothing of their contents (by hash).
        mask: (n, T) bool, as the task encodes them.
        exact: The real updates, prepared.
        ladder: Prepared backends in the order in which they are tried; the next one is asked for when one has failed.
            The exact labels themselves may stand at its end.
        begin: Documents to begin with.
        most: Documents to end with.
        accept_rho: A bar instead of 0.95; the interval may reach 0.02 below it.
        wider: The exact labels by wider arithmetic, prepared: the task without autocast, or a copy of the model and its
            optimizer in float32. None where the labels are float32's already.
        previous: n -> (n, R) what the influence model of the stage before says of the first n documents.
        seed: Of the bootstrap and of the halves.

    Returns:
        What was found, with the backend to label by.

    Raises:
        AuditError: None will do.
        ValueError: There are too few documents, or an argument is out of range.

    Cost:
        Exact labels of `begin` to `most` documents, of 64 more by `wider`, and those of each backend tried.

    Source:
        Correction for the halves' size: Spearman and Brown. Variance of Fisher's z for ranks: Bonett and Wright (2000).
    """
    if accept_rho is not None and not -1 <= accept_rho <= 1:
        raise ValueError(f"accept_rho: expected a correlation, got {accept_rho}")
    if min(begin, len(ids)) < FEWEST:
        raise ValueError(f"audit: expected at least {FEWEST} documents, got {min(begin, len(ids))}")
    if most < begin:
        raise ValueError(f"most: expected at least begin ({begin}), got {most}")
    probes = _Probes(ids[:most], mask[:most], exact, begin)
    bar = RHO if accept_rho is None else accept_rho
    names = [r.name for r in exact.references]
    rows: list[Comparison] = []
    chosen: LabelBackend | None = None
    tried: list[str] = []
    for backend in ladder:
        tried.append(backend.name)
        if backend is exact or _passes(backend, probes, names, bar, seed, rows):
            chosen = backend
            break
    worth = _worth(probes, names, wider, previous, seed)
    verdict = "refuse" if chosen is None else "pass" if len(tried) == 1 else "upgrade"
    clipped = float((probes.exact.clip < 1).double().mean())
    advice = _advice(worth, clipped, chosen)
    name = None if chosen is None else chosen.name
    found = Audit(verdict, name, bar, accept_rho, clipped, rows, worth, advice, probes.exact)
    if chosen is None:
        raise AuditError(found)
    return found


class _Probes:
    """Audited documents with their exact labels, more of them when asked."""

    def __init__(self, ids: Tensor, mask: Tensor, exact: ExactLabels, begin: int) -> None:
        self.ids, self.mask, self.backend = ids, mask, exact
        self.exact, self.examples = exact.probe(ids[:begin], mask[:begin])

    @property
    def count(self) -> int:
        return len(self.exact.values)

    def grow(self) -> bool:
        """Doubles the documents; False where there are no more."""
        more = slice(self.count, 2 * self.count)
        if not len(self.ids[more]):
            return False
        exact, examples = self.backend.probe(self.ids[more], self.mask[more])
        self.exact = Influence(*(torch.cat(each) for each in zip(self.exact, exact, strict=True)))
        self.examples = [torch.cat(each) for each in zip(self.examples, examples, strict=True)]
        return True


def _passes(
    backend: LabelBackend, probes: _Probes, names: list[str], bar: float, seed: int, rows: list[Comparison]
) -> bool:
    """Whether a backend passes; its last comparisons are added to `rows`."""
    values = backend.influence(probes.ids[: probes.count], probes.mask[: probes.count]).values
    while True:
        new = slice(len(values), probes.count)
        if new.start < new.stop:
            values = torch.cat([values, backend.influence(probes.ids[new], probes.mask[new]).values])
        pairs = zip(names, values.T.numpy(), probes.exact.values.T.numpy(), strict=True)
        found = [_compared(backend.name, name, ours, exact, seed) for name, ours, exact in pairs]
        good = [c.rho >= bar and c.low >= bar - SLACK for c in found]
        if all(good) or any(not c.high >= bar for c in found) or not probes.grow():
            rows += found
            return all(good)


def _compared(backend: str, reference: str, ours: F64, exact: F64, seed: int) -> Comparison:
    n, rho = len(ours), spearman(ours, exact)
    low, high = bootstrap_interval(ours, exact, spearman, RESAMPLES, seed)
    z, apart = math.atanh(min(rho, 1 - 1e-15)), 1.96 * math.sqrt((1 + rho * rho / 2) / (n - 3))
    slope = float(np.cov(ours, exact)[0, 1] / ours.var(ddof=1)) if ours.var() else math.nan
    return Comparison(
        backend, reference, n, rho, low, high, math.tanh(z - apart), math.tanh(z + apart), pearson(ours, exact), slope,
        top_overlap(ours, exact, SHARE),
    )  # fmt: skip


def _worth(
    probes: _Probes,
    names: list[str],
    wider: ExactLabels | None,
    previous: Callable[[int], ArrayLike] | None,
    seed: int,
) -> list[Worth]:
    exact = probes.exact.values.numpy()
    few = min(REPEATED, len(exact))
    again = None if wider is None else wider.influence(probes.ids[:few], probes.mask[:few]).values.numpy()
    said = None if previous is None else np.asarray(previous(len(exact)), np.float64)
    if said is not None and said.shape != exact.shape:
        raise ValueError(f"previous: expected scores of shape {exact.shape}, got {said.shape}")
    found = []
    for r, (name, reference) in enumerate(zip(names, probes.backend.references, strict=True)):
        h = _halves(probes.examples[r], reference.counts, seed)
        numeric = None if again is None else spearman(again[:, r], exact[: len(again), r])
        drift = None if said is None else spearman(said[:, r], exact[:, r])
        null_gain = float(probes.backend.null_gain[r])
        found.append(Worth(name, float(exact[:, r].std()), null_gain, h, 2 * h / (1 + h), numeric, drift))
    return found


def _halves(examples: Tensor, counts: Tensor, seed: int) -> float:
    """Spearman's correlation of labels (n, N) by two random halves of the examples, one example in two in each."""
    order = np.argsort(np.random.Philox(key=[seed % 2**64, len(counts)]).random_raw(len(counts)), kind="stable")
    halves = [torch.from_numpy(order[start::2].copy()) for start in (0, 1)]
    if min(len(half) for half in halves) == 0:
        return math.nan
    one, other = ((examples[:, half].sum(1) / counts[half].sum().clamp(min=1)).numpy() for half in halves)
    return spearman(one, other)


def _advice(worth: list[Worth], clipped: float, chosen: LabelBackend | None) -> list[str]:
    found = []
    for w in worth:
        if not w.reliability >= RELIABLE:
            found.append(
                f"enlarge the reference {w.reference}: labels by its halves say the same to {w.reliability:.2f}"
            )
        if w.numeric is not None and not w.numeric >= NUMERIC:
            found.append(f"the exact labels on {w.reference} are noisy: wider arithmetic agrees to {w.numeric:.2f}")
    if chosen is not None and chosen.name in ("jvp", "finite_difference") and 0.05 <= clipped <= 0.95:
        found.append(f"{clipped:.0%} of the documents are clipped, which {chosen.name} does not see: prefer dots")
    return found


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
