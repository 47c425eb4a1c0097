"""The step log and the ledger of a run, on disk as Parquet parts."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostgram.training.parts import PartedTable

if TYPE_CHECKING:
    from torch import Tensor

    from ghostgram.algorithms.in_run_shapley.scoring import Step
    from ghostgram.training.ranks import Ranks

SIGN = "value = -phi, positive = helped"


def require_pyarrow() -> None:
    """Raises an ImportError that names the extra to install when pyarrow is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError("the values, the ledger and the log are Parquet tables: pip install 'ghostgram[report]'")


class RunLog:
    """The step log and the ledger of a run.

    Args:
        folder: Where both go, as `steps` and `ledger`; None keeps them in memory.
        ranks: The processes of the run: each writes its steps in a folder of its own, the first one the ledger.
        sets: Names of the validation sets.
        compares: Whether first-order values are logged beside those of order 2.
        wide: Whether phi is kept in float64, for a model in float64.
        metadata: Goes into both schemas.
        resume: Append to a log that already holds steps.
    """

    def __init__(
        self,
        folder: str | Path | None,
        ranks: Ranks,
        sets: list[str],
        compares: bool,
        wide: bool,
        metadata: Mapping[str, str],
        resume: bool,
    ) -> None:
        import torch  # which reading a log does not need

        place = None if folder is None else Path(folder)
        self._sets, self._rank = sets, ranks.rank
        own = "steps" if ranks.size == 1 else f"steps/rank-{ranks.rank:05d}"
        self.steps = PartedTable(step_schema(sets, compares, wide, metadata), place and place / own, resume)
        ledger = place / "ledger" if place and ranks.rank == 0 else None
        self.ledger = PartedTable(ledger_schema(metadata), ledger, resume)
        last = self.ledger.last_part()
        rows = zip(last["set"].to_pylist(), last["cumulative_residual"].to_pylist(), strict=True)
        carried = {name: residual for name, residual in rows if residual is not None}  # null between refreshes
        # The first process alone has read what was carried; the others have nothing to add.
        carried_here = torch.tensor([carried.get(name, 0.0) for name in sets], dtype=torch.float64)
        self._cumulative = ranks.over_samples(carried_here).tolist()
        self._since: Tensor | None = None  # the losses last measured
        self._predicted: Tensor | None = None  # change since then

    def next_step(self) -> int:
        """The step after the last one flushed."""
        return self.steps.next_step()

    def note(self, name: str, text: str) -> None:
        """Sets an entry of the metadata of both, in parts written from now on."""
        self.steps.note(name, text)
        self.ledger.note(name, text)

    def flush(self) -> None:
        """Writes what is held in memory."""
        self.steps.flush()
        self.ledger.flush()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs of the log."""
        measured = {"since": self._since, "predicted": self._predicted}  # since the last refresh
        return {"cumulative": list(self._cumulative), **measured}

    def rewind(self, step: int, state: Mapping[str, Any]) -> None:
        """Goes back to a checkpoint taken before `step`."""
        if (found := self.next_step()) < step and self.steps.on_disk:
            raise ValueError(f"log: expected the steps before checkpoint {step}, found those before {found}")
        self.steps.rewind(step)
        self.ledger.rewind(step)
        self._cumulative = list(state["cumulative"])
        self._since, self._predicted = state["since"], state["predicted"]

    def samples(self, step: Step, order: int) -> None:
        """Logs every sample of a step."""
        result = step.result
        assert result is not None
        for index, (microbatch, phi) in enumerate(zip(step.microbatches, result.phis, strict=True)):
            rows = len(microbatch.ids)
            columns: dict[str, Any] = {
                "step": [step.number] * rows, "sample_id": microbatch.ids, "microbatch": [index] * rows,
                "rank": [self._rank] * rows, "lr": [step.lrs[0]] * rows, "clip": [result.clip] * rows,
                "order": [order] * rows, "v_state": [result.v_state] * rows, "g_val_age": [step.age] * rows,
                "skipped": [result.skipped] * rows,
                "weight": [1.0] * rows if microbatch.weights is None else microbatch.weights.tolist(),
            }  # fmt: skip
            candidates = result.candidates[index]
            for k, name in enumerate(self._sets):
                columns[f"candidate_{name}"] = [None] * rows if candidates is None else candidates[:, k].tolist()
            columns |= {f"phi_{name}": phi[:, k].tolist() for k, name in enumerate(self._sets)}
            if result.first_order is not None:
                first = result.first_order[index]
                columns |= {f"phi1_{name}": first[:, k].tolist() for k, name in enumerate(self._sets)}
            self.steps.append(columns)

    def change(self, step: Step, after: Tensor | None, order: int) -> None:
        """Logs what a step changed; `after` are the validation losses after it, None where nobody measured them."""
        result = step.result
        assert result is not None
        predicted, sets = result.sum_phi + result.history + result.uncovered, len(self._sets)
        if step.losses is not None:
            self._since, self._predicted = step.losses, predicted.new_zeros(sets)
        if self._predicted is not None:
            self._predicted = self._predicted + predicted
        cumulative: list[float] | None = None
        if after is not None and self._since is not None and self._predicted is not None:
            missed = after - self._since - self._predicted
            cumulative = self._cumulative = [c + m for c, m in zip(self._cumulative, missed.tolist(), strict=True)]
            self._since, self._predicted = after, predicted.new_zeros(sets)
        measured = None if after is None or step.losses is None else after - step.losses
        cosine, ratio = step.turned or (None, None)

        def column(values: Tensor | list[float] | None) -> list[Any]:
            return [None] * sets if values is None else values if isinstance(values, list) else values.tolist()

        # fmt: off
        self.ledger.append(
            {
                "step": [step.number] * sets, "set": self._sets, "l_before": column(step.losses),
                "l_after": column(after), "measured": column(measured), "sum_phi": column(result.sum_phi),
                "history": column(result.history), "uncovered": column(result.uncovered),
                "predicted": column(predicted), "residual": column(None if measured is None else measured - predicted),
                "cumulative_residual": column(cumulative), "lr": [step.lrs[0]] * sets, "clip": [result.clip] * sets,
                "g_val_age": [step.age] * sets, "g_val_cosine": column(cosine), "g_val_ratio": column(ratio),
                "order": [order] * sets, "v_state": [result.v_state] * sets, "skipped": [result.skipped] * sets,
                "audit": [result.audit] * sets,
            }
        )
        # fmt: on


def step_schema(sets: list[str], compares: bool, wide: bool, metadata: Mapping[str, str]) -> Any:
    """Columns of the step log: one row per scored sample and step, one phi per validation set.

    `weight` is what an online selection multiplied the sample's gradient by, 0 for those left out; 1 where nothing was
    selected. phi has it as a factor; candidate_<set> is phi at weight 1, null where nothing was selected.
    """
    import pyarrow as pa

    fields = [
        ("step", pa.int32()), ("sample_id", pa.int64()), ("microbatch", pa.int16()), ("rank", pa.int16()),
        ("lr", pa.float32()), ("clip", pa.float32()), ("order", pa.int8()), ("v_state", pa.string()),
        ("g_val_age", pa.int16()), ("skipped", pa.bool_()), ("weight", pa.float64()),
    ]  # fmt: skip
    number = pa.float64() if wide else pa.float32()
    fields += [(f"phi_{name}", number) for name in sets]
    fields += [(f"phi1_{name}", number) for name in sets if compares]
    fields += [(f"candidate_{name}", number) for name in sets]
    return pa.schema(fields, metadata={"sign": SIGN, **metadata})


def ledger_schema(metadata: Mapping[str, str]) -> Any:
    """Columns of the ledger: one row per step and validation set.

    l_before, l_after, measured, residual and cumulative_residual are null where the losses were not measured (between
    refreshes); g_val_cosine and g_val_ratio, of the gradient refreshed to its successor, where none was refreshed;
    audit where a step was not audited.
    """
    import pyarrow as pa

    numbers = (
        "l_before", "l_after", "measured", "sum_phi", "history", "uncovered", "predicted", "residual",
        "cumulative_residual", "lr", "clip",
    )  # fmt: skip
    fields = [("step", pa.int32()), ("set", pa.string())] + [(name, pa.float64()) for name in numbers]
    fields += [("g_val_age", pa.int16()), ("g_val_cosine", pa.float64()), ("g_val_ratio", pa.float64())]
    fields += [("order", pa.int8()), ("v_state", pa.string()), ("skipped", pa.bool_()), ("audit", pa.float64())]
    return pa.schema(fields, metadata={"sign": SIGN, **metadata})


def aggregate(steps: Any, sets: list[str]) -> Any:
    """The table of values: id, set, value = -(sum of phi, in float64), steps = in how many steps it was seen."""
    import pyarrow as pa
    import pyarrow.compute as pc

    tables = []
    for name in sets:
        phi = pa.table(
            {"id": steps["sample_id"], "step": steps["step"], "phi": steps[f"phi_{name}"].cast(pa.float64())}
        )
        grouped = phi.group_by("id").aggregate([("phi", "sum"), ("step", "count_distinct")]).sort_by("id")
        tables.append(
            pa.table(
                {
                    "id": grouped["id"],
                    "set": pa.array([name] * len(grouped), pa.string()),
                    "value": pc.negate(grouped["phi_sum"]),
                    "steps": grouped["step_count_distinct"],
                }
            )
        )
    return pa.concat_tables(tables)
