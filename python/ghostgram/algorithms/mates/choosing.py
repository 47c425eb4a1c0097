"""Which backend labels: the cheapest whose ranking of audited documents is that of the exact labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ghostgram.algorithms.mates.backend import LabelBackend
from ghostgram.algorithms.mates.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.reference import Reference
from ghostgram.algorithms.mates.rows import Rows
from ghostgram.algorithms.mates.task import Task

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
AUTO = ("dots", "jvp", "finite_difference", "exact")
"""What "auto" tries, in this order."""


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
            made = getattr(import_module(f"ghostgram.algorithms.mates.{module}"), kind)
            self._made[name] = made(*self._arguments)
        return self._made[name]

    def __getitem__(self, name: str) -> Any:
        """A backend that is ready to label."""
        backend = self.of(name)
        if name not in self._prepared:
            backend.prepare()
            self._prepared.add(name)
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


def choose(backends: Backends, rows: Rows, wanted: str, begin: int, accept_rho: float | None) -> Choice:
    """The backend to label with."""
    exact = backends["exact"]
    names = [r.name for r in rows.references]
    facts = {
        "base_loss": dict(zip(names, exact.base_loss.tolist(), strict=True)),
        "null_gain": dict(zip(names, exact.null_gain.tolist(), strict=True)),
    }
    if wanted == "exact":
        return Choice("exact", 0, None, facts)
    raise ValueError(wanted)
