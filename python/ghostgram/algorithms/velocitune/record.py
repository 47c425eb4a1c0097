"""The log of a mixture: a row for every domain at every update, in Parquet parts that a kill leaves readable."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghostgram.training.parts import PartedTable

INTEGERS = ("update", "step", "tokens", "version", "b_eff")
NUMBERS = (
    "w_before", "w_after", "w_mean", "loss", "se", "l_init", "target", "target_low", "target_high", "V_raw", "V", "gap",
    "degenerate", "draws", "tokens_seen", "epochs", "requested", "realised", "eval_seconds", "flops",
)  # fmt: skip
TEXTS = ("domain", "guards", "alarms")


def require_pyarrow() -> None:
    """Raises an ImportError that names the extra to install when pyarrow is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError("log: the log of a mixture is a Parquet table: pip install 'ghostgram[report]'")


def schema(metadata: Mapping[str, str]) -> Any:
    """Columns of the log; `docs/algorithms/velocitune.md` says what they are. Null is what an update has not."""
    import pyarrow as pa

    kinds = [*((name, pa.int64()) for name in INTEGERS), *((name, pa.float64()) for name in NUMBERS)]
    return pa.schema([*kinds, *((name, pa.string()) for name in TEXTS)], metadata=dict(metadata))


class MixtureRecord:
    """The rows of a run.

    Args:
        folder: Where parts go.
        domains: Names.
        metadata: Of the tables: the rule with all its settings, and so on.
        resume: Whether the run goes on: rows may be there already.

    Raises:
        FileExistsError: They are, and it does not.
        ImportError: pyarrow is missing.
    """

    def __init__(self, folder: Path, domains: Sequence[str], metadata: Mapping[str, str], resume: bool) -> None:
        require_pyarrow()
        self.domains = list(domains)
        if not resume and any(folder.glob("part-*.parquet")):
            raise FileExistsError(
                f"log: expected a new folder, or load_state_dict before the first batch, got {folder}"
            )
        self._table = PartedTable(schema(metadata), folder, resume)

    def add(self, shared: Mapping[str, Any], by_domain: Mapping[str, Any]) -> None:
        """Adds the rows of one update.

        Args:
            shared: One value for all domains, by column.
            by_domain: (K,) values by column; None, and columns left out, are null.
        """
        domains = len(self.domains)
        columns: dict[str, Any] = dict.fromkeys((*INTEGERS, *NUMBERS, *TEXTS), [None] * domains)
        columns |= {name: [value] * domains for name, value in shared.items()}
        columns |= {name: [_known(x) for x in values] for name, values in by_domain.items() if values is not None}
        self._table.append(columns | {"domain": self.domains})

    def flush(self) -> None:
        """Writes the rows added since the last flush."""
        self._table.flush()

    def rewind(self, step: int, updates: int) -> None:
        """Drops rows of later steps: those of a run that went on after its last checkpoint and was killed.

        Args:
            step: That the run goes on from.
            updates: Made until then; a log of none of them is one that begins there.

        Raises:
            ValueError: Rows of some of them are missing, or are of other domains.
        """
        self._table.rewind(step + 1)
        if (found := len(self.rows())) not in (0, updates * len(self.domains)):
            raise ValueError(
                f"log: expected a new folder, or {updates * len(self.domains)} rows of {updates} updates of "
                f"{len(self.domains)} domains, got {found}"
            )

    def rows(self) -> Any:
        """All rows, as a pyarrow.Table."""
        return self._table.read()


def _known(value: Any) -> Any:
    """The value; None for nan, which stands for ends of intervals that targets do not have."""
    return None if isinstance(value, float) and math.isnan(value) else value
