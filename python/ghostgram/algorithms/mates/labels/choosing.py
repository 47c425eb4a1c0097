"""Which backend labels: the cheapest whose ranking of audited documents is that of the exact labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike
from torch import Tensor

from ghostgram.algorithms.mates.labels.audit import FEWEST, MOST, audit
from ghostgram.algorithms.mates.labels.backend import Influence, LabelBackend
from ghostgram.algorithms.mates.labels.exact import ExactLabels
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.algorithms.mates.labels.rows import Rows
from ghostgram.algorithms.mates.labels.task import Task
from ghostgram.training.ranks import Ranks

if TYPE_CHECKING:
    import pyarrow as pa

BACKENDS = {
    "finite_difference": ("forward", "DifferenceLabels"),
    "jvp": ("forward", "JvpLabels"),
    "dots": ("first_order", "DotsLabels"),
    "adam": ("first_order", "AdamLabels"),
    "exact": ("exact", "ExactLabels"),
}
"""Module and class of each backend, in the order in which a failed audit goes on."""
AUTO = ("dots", "jvp", "finite_difference")
"""What "auto" begins with, the first that can run."""
AFFORDABLE = 20_000
"""Documents that "auto" labels exactly where nothing cheaper will do; of more it leaves that to the caller."""


class Backends:
    """The backends of one stage, each prepared when it is first asked for."""

    def __init__(self, view: OptimizerView, references: Sequence[Reference], task: Task) -> None:
        self._arguments = view.model, view, references, task
        self._made: dict[str, LabelBackend] = {}
        self._prepared: set[str] = set()

    def of(self, name: str) -> Any:
        """A backend as it is made."""
        if name not in self._made:
            module, kind = BACKENDS[name]
            made = getattr(import_module(f"ghostgram.algorithms.mates.labels.{module}"), kind)
            self._made[name] = made(*self._arguments)
        return self._made[name]

    def __getitem__(self, name: str) -> Any:
        """A backend that is ready to label."""
        backend = self.of(name)
        if name not in self._prepared:
            backend.prepare()
            self._prepared.add(name)
        return backend

    def exact_by(self, task: Task) -> Any:
        """Exact labels of another task, ready to label."""
        model, view, references, _ = self._arguments
        backend = ExactLabels(model, view, references, task)
        backend.prepare()
        return backend

    def why_not(self, name: str) -> str | None:
        """Why a backend cannot run here, or None; it is prepared then."""
        if reason := self.of(name).why_not():
            return str(reason)
        try:
            self[name]
        except RuntimeError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class Choice:
    """A backend, and what it was chosen by."""

    backend: str
    audited: int
    """How many documents have been labelled exactly for it: the first by id."""
    table: pa.Table | None = None
    """Their exact labels."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the manifest says of the choice."""


class Shared:
    """A backend whose documents replicas share out: each takes every size-th, and all get the results of all.

    Alone, and under `fully_shard` where all work on each document together, it is the backend itself.

    Args:
        backend: The backend, prepared.
        ranks: The processes.
        check: Looks at what documents (ids, influence) were found to do, before anyone computes with it.
    """

    def __init__(self, backend: Any, ranks: Ranks, check: Callable[[Tensor, Influence], None]) -> None:
        self._backend, self._ranks, self._check = backend, ranks, check
        self._alone = ranks.size == 1 or ranks.sharded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def influence(self, ids: Tensor, mask: Tensor) -> Influence:
        """See `LabelBackend`."""
        if self._alone:
            found: Influence = self._backend.influence(ids, mask)
        else:
            (merged,) = self._merged(len(ids), lambda mine: (self._backend.influence(ids[mine], mask[mine]),))
            found = Influence(*merged)
        self._check(ids, found)
        return found

    def probe(self, ids: Tensor, mask: Tensor) -> tuple[Influence, list[Tensor]]:
        """See `ExactLabels`."""
        if self._alone:
            found, examples = self._backend.probe(ids, mask)
        else:
            merged, examples = self._merged(len(ids), lambda mine: self._backend.probe(ids[mine], mask[mine]))
            found = Influence(*merged)
        self._check(ids, found)
        return found, examples

    def _merged(self, count: int, of_mine: Callable[[slice], Sequence[Sequence[Tensor]]]) -> list[list[Tensor]]:
        """Tensors over documents, put together from what each process has of them."""
        size = self._ranks.size
        mine = of_mine(slice(self._ranks.rank, None, size)) if self._ranks.rank < count else None
        every = [each for each in self._ranks.of_all(mine) if each is not None]
        merged: list[list[Tensor]] = []
        for groups in zip(*every, strict=True):
            merged.append([])
            for parts in zip(*groups, strict=True):
                whole = parts[0].new_empty(count, *parts[0].shape[1:])
                for rank, part in enumerate(parts):
                    whole[rank::size] = part
                merged[-1].append(whole)
        return merged


def choose(
    backends: Backends,
    rows: Rows,
    ranks: Ranks,
    settings: Mapping[str, Any],
    wider: Task | None,
    previous: Callable[[Sequence[str]], ArrayLike] | None,
) -> Choice:
    """The backend to label with, the audit that led to it, and the exact labels that it took; see `label`.

    Raises:
        ValueError: The backend that is wanted cannot run, or none can.
        AuditError: None that may be used passes.
    """
    wanted, begin, accept_rho = (settings[name] for name in ("backend", "audit", "accept_rho"))
    ids, mask = rows.encoded(rows.by_id[: max(MOST, begin)])
    numbers = {row.numpy().tobytes(): i for row, i in zip(ids, rows.by_id, strict=False)}

    def check(ids: Tensor, influence: Influence) -> None:
        rows.check([numbers[row.numpy().tobytes()] for row in ids], influence)

    def shared(name: str) -> Any:
        return Shared(backends[name], ranks, check)

    exact = shared("exact")
    names = [r.name for r in rows.references]
    facts: dict[str, Any] = {
        "base_loss": dict(zip(names, exact.base_loss.tolist(), strict=True)),
        "null_gain": dict(zip(names, exact.null_gain.tolist(), strict=True)),
    }
    if wanted == "exact" and min(begin, len(rows.ids)) < FEWEST:
        return Choice("exact", 0, None, facts | {"audit": None})

    def drift(count: int) -> ArrayLike:
        assert previous is not None
        return previous([rows.texts[i] for i in rows.by_id[:count]])

    ladder = (exact if name == "exact" else shared(name) for name in _ladder(backends, wanted, len(rows.ids)))
    found = audit(
        ids, mask, exact, ladder, begin=min(begin, len(ids)), most=len(ids), accept_rho=accept_rho,
        wider=backends.exact_by(wider) if wider else None, previous=previous and drift,
    )  # fmt: skip
    audited = rows.by_id[: found.documents]
    chosen = str(found.backend)
    facts["audit"] = _finite(found.manifest())
    facts["capped_fraction"] = getattr(backends.of(chosen), "capped_fraction", None)
    choice = Choice(chosen, len(audited), rows.table(audited, found.exact, mask[: len(audited)], "exact", True), facts)
    agreed: Choice = ranks.of_all(choice)[0]  # rounding may differ between processes: one verdict for all
    return agreed


def _ladder(backends: Backends, wanted: str, documents: int) -> Iterator[str]:
    """The backends that may be used, in the order in which they are tried, each ready."""
    if wanted != "auto":
        if reason := backends.why_not(wanted):
            raise ValueError(f"backend: {wanted!r} cannot run here: {reason}")
        yield wanted
        return
    reasons: dict[str, str] = {}
    for first in AUTO:
        if reason := backends.why_not(first):
            reasons[first] = reason
            continue
        yield first
        order = [*BACKENDS]
        yield from (name for name in order[order.index(first) + 1 : -1] if not backends.why_not(name))
        break
    if documents <= AFFORDABLE:
        yield "exact"
    elif len(reasons) == len(AUTO):
        raise ValueError(
            f"backend: expected 'exact', or at most {AFFORDABLE} documents where nothing cheaper can run, got 'auto' "
            f"and {documents}; " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        )


def _finite(value: Any) -> Any:
    """A value as JSON has it: what is not a number is null."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
