"""The stages of a training run: warm up on random documents, then, every so often, choose the next ones anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghostgram._files import sweep
from ghostgram.algorithms.mates.dataset import TEXTS, PlanDataset, write_texts
from ghostgram.algorithms.mates.files.identity import content_key
from ghostgram.algorithms.mates.files.pool import Pool
from ghostgram.algorithms.mates.files.store import Stage
from ghostgram.algorithms.mates.influence import model as influence
from ghostgram.algorithms.mates.influence.model import InfluenceModel
from ghostgram.algorithms.mates.labels.label import label
from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.algorithms.mates.labels.task import Task
from ghostgram.algorithms.mates.run import Selection, drift_of, mates
from ghostgram.algorithms.mates.selection import streams
from ghostgram.algorithms.mates.selection.ledger import Ledger
from ghostgram.algorithms.mates.selection.plan import Plan
from ghostgram.algorithms.mates.selection.select import select
from ghostgram.algorithms.mates.stages import PLAN
from ghostgram.training.ranks import led

OF_THE_DRAW = ("tokens", "docs", "ratio", "quotas", "one_per", "seed", "reuse")
"""What a plan of random documents has in common with the selected ones."""
CHECKS = "checks"
"""The folder, within that of the run, of the labels by which drift is measured; its stages are steps."""


class StageLoop:
    """MATES around any training loop: stage 0 is random documents, every later one a call of `mates`.

    Examples:
        >>> data = PlanDataset(item=tokenize)  # doctest: +SKIP
        >>> loop = StageLoop(data, pool, reference, task, "run/", every=10_000, documents_per_step=512, docs=5_120_000)
        >>> loop.begin()
        >>> for step, batch in enumerate(DataLoader(data, batch_size=512), 1):
        ...     loss(model, batch).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     loop.step_done(step, model, optimizer)

    A checkpoint holds `state_dict(step)`; after `load_state_dict` the data goes on with the next document, and a stage
    that a kill had cut off goes on where it was.

    Args:
        data: What training reads.
        pool: The documents to choose from.
        references: What the model shall get better at.
        task: What a document is to the model.
        run: The folder of the run.
        every: Steps of a stage.
        documents_per_step: Documents of a step, over all processes.
        warm_up: Steps of stage 0; `every` by default. A model must have learnt something before it can say what helps.
        check_every: Measures every so many steps, by exact labels of `check` documents, whether the influence model
            still holds; 0: never.
        check: Documents of such a measurement.
        refresh_below: Begins the next stage early where its Spearman, for any reference, has fallen below this.
        options: What else `mates` takes; its budget is that of every plan, stage 0's too.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        data: PlanDataset,
        pool: Pool,
        references: Reference | Sequence[Reference],
        task: Task,
        run: str | Path,
        *,
        every: int,
        documents_per_step: int,
        warm_up: int | None = None,
        check_every: int = 0,
        check: int = 128,
        refresh_below: float = 0.5,
        **options: Any,
    ) -> None:
        for name, number, least in (
            ("every", every, 1), ("documents_per_step", documents_per_step, 1), ("warm_up", every if warm_up is None
             else warm_up, 1), ("check_every", check_every, 0), ("check", check, 8),
        ):  # fmt: skip
            if number < least:
                raise ValueError(f"{name}: expected at least {least}, got {number}")
        self.data, self.pool, self.task, self.run = data, pool, task, Path(run)
        self.references = [references] if isinstance(references, Reference) else list(references)
        self.every, self.warm_up = every, every if warm_up is None else warm_up
        self.documents_per_step, self.check_every, self.check = documents_per_step, check_every, check
        self.refresh_below, self.options = refresh_below, options
        self.ledger = Ledger(self.run / "ledger", options.get("reuse", 1))
        self.stage, self.began = 0, 0
        """The current stage, and the step that it began after."""
        self.selection: Selection | None = None
        """The last one that this process has made."""
        self.scorer: InfluenceModel | None = None
        self.drifts: list[tuple[int, dict[str, float]]] = []
        """What every check has measured: the step, and Spearman by reference."""
        self._scorer_at: str | None = None

    def begin(self) -> None:
        """Gives the data its first plan, of random documents, unless a checkpoint has been loaded."""
        if not self.data.has_plan:
            made = led(self._random)
            self._follow(Plan(made.read(), made.require()["report"]), made.folder)

    def step_done(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Selection | None:
        """To be called after every optimizer step, the learning rate being the next step's; all processes alike.

        Args:
            step: How many steps have been done.
            model: The model.
            optimizer: Its optimizer.

        Returns:
            The selection of a stage that begins now, if one does.
        """
        due = step - self.began >= (self.every if self.stage else self.warm_up)
        if not due and self.scorer is not None and self.check_every and (step - self.began) % self.check_every == 0:
            drift = self.drift(step, model, optimizer)
            self.drifts.append((step, drift))
            due = not drift or not all(rho >= self.refresh_below for rho in drift.values())  # nan: it says nothing
        return self.next_stage(step, model, optimizer) if due else None

    def next_stage(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Selection:
        """Begins the next stage after a step: enters what was read, and chooses what comes next.

        What a loader has read ahead will be trained on: it is passed over, too.

        Args:
            step: How many optimizer steps were done.
            model: The model as it is now.
            optimizer: Its optimizer, whose state labels are taken with.
        """
        led(lambda: self._enter(self.data.position(self.data.read)))
        made = mates(
            model, optimizer, self.pool, self.references, self.task, self.run,
            stage=self.stage + 1, previous=self.scorer, **self.options,
        )  # fmt: skip
        self.stage, self.began, self.selection, self.scorer = self.stage + 1, step, made, made.scorer
        self._scorer_at = made.folders.get("fit", self._scorer_at)
        self._follow(made.plan, made.folders["select"])
        return made

    def drift(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Spearman of the influence model in use with exact labels of now, by reference.

        Args:
            step: How many optimizer steps were done; other documents are labelled at another step.
            model: The model as it is now.
            optimizer: Its optimizer.
        """
        assert self.scorer is not None
        documents = self.pool.sample(self.check, streams.stream(self.options.get("seed", 0), step, "check"))
        how = {name: self.options[name] for name in ("clip", "lrs") if name in self.options}
        exact = label(
            model, optimizer, documents, self.references, self.task, self.run / CHECKS, stage=step, backend="exact",
            progress=False, **how,
        )  # fmt: skip
        return drift_of(self.scorer, exact, documents)

    def state_dict(self, step: int) -> dict[str, Any]:
        """What goes into a checkpoint that is taken after a step."""
        documents = step * self.documents_per_step
        led(lambda: self._enter(self.data.position(documents)))
        return {
            "stage": self.stage, "began": self.began, "scorer": self._scorer_at, "drifts": self.drifts,
            "data": self.data.state_dict(documents),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.stage, self.began, self.drifts = int(state["stage"]), int(state["began"]), list(state["drifts"])
        self._scorer_at = state["scorer"]
        self.scorer = influence.load(Path(self._scorer_at, "model")) if self._scorer_at else None
        self.data.load_state_dict(state["data"])

    def _enter(self, trained_on: Mapping[int, int]) -> None:
        for stage, documents in trained_on.items():
            self.ledger.consume(stage, documents)

    def _follow(self, plan: Plan, folder: str) -> None:
        """Makes training read a plan."""
        texts = Path(folder, TEXTS)
        led(lambda: None if texts.exists() else self._write(plan, texts))
        self.data.switch(self.stage, texts)

    def _write(self, plan: Plan, texts: Path) -> None:
        sweep(texts.parent)
        write_texts(plan, self.pool, texts)

    def _random(self) -> Stage:
        """The "select" stage of stage 0: every document has the same score."""
        draw = {name: self.options[name] for name in OF_THE_DRAW if name in self.options and name != "reuse"}
        made = Stage(
            self.run, 0, "select", content_key("select", {**draw, "standardise": "none"}, {"pool": self.pool.digest})
        )
        if not made.is_complete:
            made.begin(pool=self.pool.digest)
            plan = select([self._zeros(shard) for shard in self.pool.shards], **draw, standardise="none")
            made.commit(PLAN, plan.table)
            made.complete(report=plan.report)
        self.ledger.plan(Plan(made.read(), {}), 0)
        return made

    def _zeros(self, shard: Any) -> Any:
        """The scores of documents that nobody has asked about."""
        import pyarrow as pa

        names = ["doc_id", "n_tokens", "domain", "cluster_id"]
        table = pa.concat_tables([each.select(names) for each in self.pool.documents(shard)])
        return table.append_column("z_none", pa.array([0.0] * len(table), pa.float32()))
