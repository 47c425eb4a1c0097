"""The label stage: what one update on each document would do to the references, committed chunk by chunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import ArrayLike
from torch import nn

from ghostgram.algorithms.mates.files.identity import content_key
from ghostgram.algorithms.mates.files.store import Stage
from ghostgram.algorithms.mates.labels.choosing import BACKENDS, Backends, Choice, choose
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.algorithms.mates.labels.rows import AUDIT, Rows
from ghostgram.algorithms.mates.labels.table import Labels
from ghostgram.algorithms.mates.labels.task import Task

if TYPE_CHECKING:
    import pyarrow as pa

UNIT = "nats per reference token"


def label(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    documents: pa.Table,
    references: Sequence[Reference],
    task: Task,
    run: str | Path | None = None,
    *,
    stage: int = 1,
    backend: str = "auto",
    clip: float | None = None,
    lrs: Sequence[float] | None = None,
    chunk: int = 64,
    audit: int = 256,
    accept_rho: float | None = None,
    wider: Task | None = None,
    previous: Callable[[Sequence[str]], ArrayLike] | None = None,
    progress: bool = True,
) -> Labels:
    """Labels documents with their influence: by how much one update on each alone would lower each reference's loss.

        influence_r(x) = L_r(theta) - L_r(theta_x),        theta_x = the optimizer's next step on the batch {x}

    Positive is good. Training is left as it was found, to the bit.

    Documents with the smallest ids are labelled exactly as well; the others' labels are taken by a cheaper backend only
    where its ranking of these agrees with theirs (`audit`). Rows of audited documents hold the exact labels.

    With `run`, chunks are committed to `<run>/stage-<stage>/label/<key>` one by one, the key being a digest of all that
    they are made from: called again after a kill this goes on after the last of them, and what is complete is read.

    Under DistributedDataParallel the processes share the chunks, which come together in `run`; under `fully_shard`
    they work on every document together. All processes must call this alike.

    Args:
        model: The model as it is trained, wrapper included.
        optimizer: Its optimizer, with the state of its last step.
        documents: A pyarrow.Table with doc_id (16 bytes, each once) and text.
        references: What shall get better.
        task: What a document is to the model.
        run: The folder of the run, on a file system that all processes see; None where labels are not to be kept.
        stage: Its number, from 1.
        backend: "exact", "adam", "dots", "jvp" or "finite_difference", which must then pass the audit; or "auto": the
            first of "dots", "jvp" and "finite_difference" that can run, and where the audit asks for it a better one.
        clip: The largest norm of a gradient in training, None where it is not clipped.
        lrs: The learning rate of the next update by parameter group; None for what the groups hold.
        chunk: Documents of a chunk.
        audit: Documents to begin the audit with; more are taken while its verdict is open. With "exact" labels it
            tells what the references are worth, and may be 0.
        accept_rho: A lower bar for the audit's rank correlation than its own, if that is to do.
        wider: The task by wider arithmetic, where `task` has 16-bit autocast in its `logits`: the audit labels 64
            documents by both, and reports whether the exact labels drown in rounding.
        previous: What the influence model of the stage before says of texts, (n, R) for n of them: the audit reports
            its rank correlation with today's exact labels, and so how far training has drifted from it.
        progress: Whether a bar shows how far it is, where rich is installed.

    Returns:
        The labels of all documents.

    Raises:
        ValueError: An argument is not as described; or an influence is not finite, the documents being named.
        AuditError: No backend that may be used agrees with the exact labels; the message holds the table.
        StoreError: Files of the run are damaged.

    Cost:
        By backend, see docs/algorithms/mates.md; the manifest holds the FLOPs of these labels.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: expected auto, {', '.join(BACKENDS)}, got {backend!r}")
    rows = Rows(documents, references, task, chunk)
    view = OptimizerView(model, optimizer, clip=clip, lrs=lrs)
    settings = {
        "backend": backend, "clip": clip, "lrs": view.lrs, "chunk": chunk, "audit": audit, "accept_rho": accept_rho,
    }  # fmt: skip
    job = _Job(rows, view, settings, wider, previous, progress)
    if run is not None:
        return job.run(run, stage, leads=view.ranks.rank == 0)
    if view.ranks.size > 1 and not view.ranks.sharded:
        raise ValueError("run: expected a folder, where DistributedDataParallel's processes put their chunks, got None")
    with TemporaryDirectory() as folder:
        return replace(job.run(folder, stage, leads=True), folder=None)


class _Job:
    """One label stage, whatever has been done of it before."""

    def __init__(
        self,
        rows: Rows,
        view: OptimizerView,
        settings: dict[str, Any],
        wider: Task | None,
        previous: Callable[[Sequence[str]], ArrayLike] | None,
        progress: bool,
    ) -> None:
        self.rows, self.ranks, self.settings = rows, view.ranks, settings
        self.wider, self.previous, self.progress = wider, previous, progress
        self.inputs = rows.inputs(view)
        self.backends = Backends(view, rows.references, rows.task)

    def run(self, run: str | Path, number: int, leads: bool) -> Labels:
        """Does what is not committed; `leads` says whether this process writes what all have in common."""
        made_from = {"settings": self.settings, "inputs": self.inputs}
        stage = Stage(run, number, "label", content_key("label", self.settings, self.inputs))
        held = stage.manifest
        self.ranks.wait()  # until all have seen what is held, before any adds to it
        if not stage.is_complete:
            choice = self._begin(stage, leads, made_from) if held is None else Choice(held["chosen"], held["audited"])
            self._work(stage, leads, choice)
            self.ranks.wait()
            if leads:
                stage.complete(flops=self._flops(stage.read(["backend", "length"])))
            self.ranks.wait()
        manifest = stage.require(**made_from)
        return Labels(self.rows.in_order(stage.read()), manifest, stage.folder)

    def _begin(self, stage: Stage, leads: bool, made_from: dict[str, Any]) -> Choice:
        """Chooses a backend, and writes what it was chosen by."""
        choice = choose(self.backends, self.rows, self.ranks, self.settings, self.wider, self.previous)
        if leads:
            if choice.table is not None:
                stage.commit(AUDIT, choice.table, input=self.rows.input(self.rows.by_id[: choice.audited]))
            stage.begin(**made_from, **choice.facts, chosen=choice.backend, audited=choice.audited, unit=UNIT)
        self.ranks.wait()
        return choice

    def _work(self, stage: Stage, leads: bool, choice: Choice) -> None:
        """Labels and commits the units that are not there yet."""
        units = self.rows.units(choice.audited)
        inputs = {unit: self.rows.input(of_unit) for unit, of_unit in units.items()}
        done = stage.committed(inputs)
        self.ranks.wait()  # until all know the same units to be done
        ahead = [unit for unit in units if unit not in done]
        sharded = self.ranks.sharded
        with _bar(self.progress and self.ranks.rank == 0, sum(len(units[unit]) for unit in ahead)) as advance:
            for unit in ahead if sharded else ahead[self.ranks.rank :: self.ranks.size]:
                name = "exact" if unit == AUDIT else choice.backend
                table = self.rows.labelled(units[unit], self.backends[name], unit == AUDIT)
                if leads or not sharded:
                    stage.commit(unit, table, input=inputs[unit])
                advance(len(units[unit]) * (1 if sharded else self.ranks.size))

    def _flops(self, table: pa.Table) -> dict[str, float]:
        """What the rows took, by backend, as counted by each."""
        found: dict[str, float] = {}
        kinds = Counter(zip(table["backend"].to_pylist(), table["length"].to_pylist(), strict=True))
        for (name, length), count in sorted(kinds.items()):
            found[name] = found.get(name, 0.0) + count * self.backends.of(name).flops(length)
        return found


@contextmanager
def _bar(shown: bool, documents: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over documents, where it is wanted and rich is installed."""
    if not shown or find_spec("rich") is None:
        yield lambda _: None
        return
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("label", total=documents)
        yield lambda count: bar.advance(task, count)
