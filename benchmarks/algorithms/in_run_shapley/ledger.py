"""How far the ledger is from the measured change of the validation losses, over 200 steps of AdamW.

    python benchmarks/algorithms/in_run_shapley/ledger.py --model demo --lr 5e-4 --way "order 2"    # a minute or two
    python benchmarks/algorithms/in_run_shapley/ledger.py --table

The demo's text, sets (prose and code, 8 windows each), warm-up and clipping; its model, or a smaller one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import common  # puts examples/ on the path
import in_run_shapley as demo
import numpy as np
import torch
from rich.console import Console
from tiny_lm import TinyLM
from torch import Tensor, nn

import ghostgram as gg
from ghostgram.algorithms.in_run_shapley import directions

STEPS, DOCUMENTS, SEED = 200, 3000, 0
WAYS = {
    "order 1, pre": {"order": 1, "v_state": "pre"},
    "order 1, post": {"order": 1, "v_state": "post"},
    "order 2, post": {"order": 2, "v_state": "post"},
    "order 2, middle alone": {"order": 2},
    "order 2": {"order": 2},  # by the secant
}
MODELS = {"demo": (demo.WIDTH, demo.LAYERS, demo.HEADS), "small": (64, 2, 4)}


class Run:
    """A model about to be trained, with its engine.

    Attributes:
        batches: ids and windows of each.
        gradients: How many validation gradients were taken, of all sets together.
    """

    def __init__(self, model: str, lr: float, way: str) -> None:
        corpus = demo.gather(DOCUMENTS, "shuffle", SEED, Console())
        text = torch.from_numpy(corpus.windows).long()
        torch.manual_seed(SEED)
        self.validation, self.gradients = corpus.validation, 0
        self.learner = common.Learner(SEED, lr, TinyLM(*MODELS[model], demo.WINDOW))
        sets = {name: partial(self.loss, common.mean_loss(windows)) for name, windows in self.validation.items()}
        self.shapley = gg.InRunShapley(self.learner.model, self.learner.optimizer, sets, **WAYS[way])
        self.batches = [(ids, text[ids]) for ids in common.batches(len(text), STEPS, SEED, size=demo.BATCH)]
        if way == "order 2, middle alone":
            directions.PARTS = 1

    def loss(self, mean: Callable[[nn.Module], Tensor], model: nn.Module) -> Tensor:
        self.gradients += torch.is_grad_enabled()
        return mean(model)


def run(model: str, lr: float, way: str, steps: int) -> None:
    trained = Run(model, lr, way)
    learner, shapley = trained.learner, trained.shapley
    for ids, windows in trained.batches[:steps]:
        learner.step(windows, shapley.step(ids=ids))
    ledger = shapley.ledger()
    gradients = trained.gradients / len(trained.validation) / steps
    for name, windows in trained.validation.items():
        mine = ledger.filter([each == name for each in ledger["set"].to_pylist()])
        key = {"model": model, "lr": lr, "way": way, "steps": steps, "set": name}
        common.record("ledger", key, **summary(mine), gradients=gradients, noise=noise_floor(learner, windows))


def summary(ledger: Any) -> dict[str, float]:
    """Totals of one set's ledger, and how its residuals are spread over steps."""
    names = ("measured", "sum_phi", "history", "predicted", "residual", "cumulative_residual")
    columns = {name: ledger[name].to_numpy() for name in names}
    residual = columns["residual"]
    worst = int(np.abs(residual).argmax())
    return {name: float(columns[name].sum()) for name in names[:-1]} | {
        "rms": float(np.sqrt((residual**2).mean() / (columns["measured"] ** 2).mean())),
        "drift": float(np.abs(columns["cumulative_residual"]).max()),
        "worst_step": worst,
        "worst": float(residual[worst]),
        "worst_measured": float(columns["measured"][worst]),
        "first_20": float(residual[:20].sum()),
        "from_20_to_100": float(residual[20:100].sum()),
        "after_100": float(residual[100:].sum()),
    }


@torch.no_grad()
def noise_floor(learner: common.Learner, windows: Tensor) -> float:
    """The same weights and windows, read at once and one by one."""
    loss = common.mean_loss(windows)(learner.model).item()
    return abs(loss - float(np.mean([common.mean_loss(window)(learner.model).item() for window in windows.split(1)])))


def table() -> None:
    order = {way: index for index, way in enumerate(WAYS)}
    kept = sorted(
        common.rows("ledger"), key=lambda row: (row["model"], row["lr"], row["steps"], row["set"], order[row["way"]])
    )
    print("nats per byte; error = residual / measured, both over all steps")
    show("model lr steps way set sum_phi history predicted measured error RMS drift noise_floor gradients_a_step")
    for row in kept:
        numbers = [f"{row[name]:+.3f}" for name in ("sum_phi", "history", "predicted", "measured")]
        numbers += [f"{row['residual'] / row['measured']:+.1%}", f"{row['rms']:.3f}", f"{row['drift']:.3f}"]
        print("|", " | ".join([*named(row), *numbers]), f"| {row['noise']:.0e} | {row['gradients']:.2f} |")
    print("\nresiduals by steps: of 0 to 19 (warm-up), 20 to 99, 100 to 199; and the largest of a step")
    show("model lr steps way set 0-19 20-99 100-199 largest at_step measured_there")
    for row in kept:
        numbers = [f"{row[name]:+.4f}" for name in ("first_20", "from_20_to_100", "after_100", "worst")]
        print("|", " | ".join([*named(row), *numbers]), f"| {row['worst_step']} | {row['worst_measured']:+.4f} |")


def named(row: dict[str, Any]) -> list[str]:
    return [row["model"], f"{row['lr']:g}", str(row["steps"]), row["way"], row["set"]]


def show(columns: str) -> None:
    """The head of a table."""
    names = [name.replace("_", " ") for name in columns.split()]
    print("|", " | ".join(names), "|\n" + "|---" * len(names) + "|")


if __name__ == "__main__":
    common.main(
        __doc__, run, table,
        model={"choices": MODELS, "default": "demo"}, lr={"type": float, "default": 5e-4},
        way={"choices": WAYS, "default": "order 2"}, steps={"type": int, "default": STEPS},
    )  # fmt: skip
