"""In-Run Data Shapley on the demo's model: what a scored step costs, and how far the ledger is from the truth.

    python benchmarks/algorithms/bench_in_run_shapley.py

Prints the step time over the plain step's, interleaved, and the parts of the difference; then the ledger of 50 steps,
step by step and in total.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import ghostgram as gg

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import in_run_shapley as demo
from tiny_lm import TinyLM, next_byte_loss

ROUNDS, LEDGER_STEPS, DOCUMENTS = 40, 50, 1600


class Variant:
    """A copy of the model trained in one way; `step` trains on one batch."""

    def __init__(self, model: TinyLM, validation: dict[str, partial] | None) -> None:
        self.learner = demo.Learner(copy.deepcopy(model))
        self.shapley = (
            gg.InRunShapley(self.learner.model, self.learner.optimizer, validation) if validation is not None else None
        )
        self.seconds: list[float] = []

    def step(self, ids: torch.Tensor, text: torch.Tensor) -> None:
        started = time.perf_counter()
        if self.shapley is None:
            next_byte_loss(self.learner.model, text).backward()
        else:
            with self.shapley.step(ids=ids):
                next_byte_loss(self.learner.model, text).backward()
        self.learner.update()
        self.seconds.append(time.perf_counter() - started)


def cost(corpus: demo.Corpus, console: Console) -> None:
    """Step times of plain training, of training with the validation pass alone, and of scored training."""
    torch.manual_seed(0)
    model = TinyLM(demo.WIDTH, demo.LAYERS, demo.HEADS, demo.WINDOW)
    text = torch.from_numpy(corpus.windows).long()
    one = {"one": partial(next_byte_loss, text=next(iter(corpus.validation.values()))[:2])}
    sets = {name: partial(next_byte_loss, text=windows) for name, windows in corpus.validation.items()}
    variants = {
        "plain": Variant(model, None),
        "scored, 1 set of 2 windows": Variant(model, one),
        f"scored, {len(sets)} sets of {demo.VALIDATION_WINDOWS} windows": Variant(model, sets),
    }
    passes = {name: [] for name in ("validation pass, 1 set of 2 windows", "validation passes, all sets")}
    for ids in list(demo.batches(len(text), 1, 0))[:ROUNDS]:
        for variant in variants.values():
            variant.step(ids, text[ids])
        for name, losses in zip(passes, (one, sets), strict=True):
            twin = variants["plain"].learner.model
            started = time.perf_counter()
            for loss in losses.values():
                torch.autograd.grad(loss(twin), list(twin.parameters()))
            passes[name].append(time.perf_counter() - started)
    plain = statistics.median(variants["plain"].seconds[5:])
    table = Table(title=f"step time over plain ({1e3 * plain:.0f} ms), medians of {ROUNDS - 5} interleaved rounds")
    table.add_column("what")
    table.add_column("ratio", justify="right")
    for name, variant in variants.items():
        table.add_row(name, f"{statistics.median(variant.seconds[5:]) / plain:.3f}")
    for name, seconds in passes.items():
        table.add_row(f"  of it: {name}", f"{statistics.median(seconds[5:]) / plain:.3f}")
    console.print(table)


def ledger(corpus: demo.Corpus, console: Console) -> None:
    """The ledger of the first steps of the demo's run, per step and in total."""
    torch.manual_seed(0)
    learner = demo.Learner(TinyLM(demo.WIDTH, demo.LAYERS, demo.HEADS, demo.WINDOW))
    sets = {name: partial(next_byte_loss, text=windows) for name, windows in corpus.validation.items()}
    shapley = gg.InRunShapley(learner.model, learner.optimizer, sets)
    text = torch.from_numpy(corpus.windows).long()
    for ids in list(demo.batches(len(text), 1, 0))[:LEDGER_STEPS]:
        with shapley.step(ids=ids):
            next_byte_loss(learner.model, text[ids]).backward()
        learner.update()
    rows = shapley.ledger().to_pylist()
    names = ("measured", "sum_phi", "history", "predicted", "residual")
    table = Table(title="ledger, nats")
    for column in ("step", "set", *names):
        table.add_column(column, justify="left" if column == "set" else "right")
    for row in rows:
        table.add_row(str(row["step"]), row["set"], *(f"{row[name]:+.4f}" for name in names))
    for chosen in sets:
        mine = [row for row in rows if row["set"] == chosen]
        table.add_row("total", chosen, *(f"{sum(row[name] for row in mine):+.4f}" for name in names), style="bold")
    console.print(table)


if __name__ == "__main__":
    out = Console()
    data = demo.gather(DOCUMENTS, "shuffle", 0, out)
    cost(data, out)
    ledger(data, out)
