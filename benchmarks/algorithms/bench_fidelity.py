"""How near the closed forms of In-Run Data Shapley come to the Shapley values of the optimizer's real step.

    python benchmarks/algorithms/bench_fidelity.py                 # both models, all learning rates: five minutes
    python benchmarks/algorithms/bench_fidelity.py --lm 3e-4       # the language model at one

The truth is torch's own step on subsets of the batch and the validation loss after it: all subsets for the two-layer
model, 1000 permutations for the language model. Prints means over steps of correlations and of the root mean square
error over the root mean square of the true values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ghostgram import data
from ghostgram.algorithms.in_run_shapley.fidelity import FORMS, Agreement, agreement, closed_form
from ghostgram.algorithms.in_run_shapley.monte_carlo import StepGame, StepValues, exact_shapley, monte_carlo_shapley

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tiny_lm import TinyLM, next_byte_loss

WINDOW, BATCH, VALIDATION, PERMUTATIONS = 64, 16, 8, 1000
LM_STEPS, TWO_LAYER_STEPS = (20, 30, 40, 50), range(4, 44)
LM_RATES, TWO_LAYER_RATES = (3e-4, 1e-3, 5e-3), (5e-3, 2e-2, 1e-1)
Losses = Callable[[nn.Module], Tensor]


def agreements(
    model: nn.Module,
    rate: float,
    batches: Iterator[Losses],
    validation: Losses,
    steps: range | tuple[int, ...],
    truth: Callable[[StepGame], StepValues],
) -> tuple[dict[str, list[Agreement]], float]:
    """Trains with AdamW and compares all forms at some of the steps; and the largest standard error of the truth."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)
    found: dict[str, list[Agreement]] = {form: [] for form in FORMS}
    error = 0.0
    for number in range(steps[-1] + 1):
        losses = next(batches)
        optimizer.param_groups[0]["lr"] = rate * min(1, (number + 1) / 10)
        if number in steps:
            game = StepGame(model, optimizer, lambda losses=losses: losses(model), validation)
            exact = truth(game)
            error = max(error, float(exact.errors.max() / exact.values.square().mean().sqrt()))
            for form, how in FORMS.items():
                found[form].append(agreement(closed_form(game, *how).values[:, 0], exact.values[:, 0]))
        optimizer.zero_grad()
        losses(model).sum().backward()
        optimizer.step()
    return found, error


def language_model(rate: float) -> tuple[dict[str, list[Agreement]], float]:
    """Two blocks 32 wide on bytes of Python code and of its documentation; validation on held-out documentation."""
    parts, held_out = {}, {}
    for name in ("python_code", "tech_docs"):
        parts[name], held_out[name] = data.split(data.load_text(name), 0.1, 0)
    count = BATCH * (LM_STEPS[-1] + 1) // 2
    cut = np.concatenate([data.windows(documents, WINDOW, count, 0) for documents in parts.values()])
    text = torch.tensor(cut).long()[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))]
    seen = [document for documents in parts.values() for document in documents]
    held = torch.tensor(data.windows(held_out["tech_docs"], WINDOW, VALIDATION, 0, absent_from=seen)).long()

    def shares(model: nn.Module, windows: Tensor) -> Tensor:
        logits = model(windows[:, :-1])
        return F.cross_entropy(logits.mT, windows[:, 1:], reduction="none").mean(1) / len(windows)

    batches = (lambda model, w=w: shares(model, w) for w in text.split(BATCH))
    torch.manual_seed(0)
    model = TinyLM(32, 2, 2, WINDOW)
    truth = partial(monte_carlo_shapley, permutations=PERMUTATIONS)
    return agreements(model, rate, batches, lambda m: next_byte_loss(m, held), LM_STEPS, truth)


def two_layers(rate: float) -> tuple[dict[str, list[Agreement]], float]:
    """4 inputs, 6 hidden units, one output, a regression; batches of 8."""
    generator = torch.Generator().manual_seed(0)

    def squares(count: int) -> Losses:
        x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
        y = torch.sin(x.sum(1)) + 0.1 * torch.randn(count, generator=generator, dtype=torch.float64)
        return lambda model: (model(x).squeeze(-1) - y).square() / count

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    held = squares(16)
    batches = iter(lambda: squares(8), None)
    return agreements(model, rate, batches, lambda m: held(m).sum(), TWO_LAYER_STEPS, exact_shapley)


def show(title: str, results: dict[float, tuple[dict[str, list[Agreement]], float]]) -> None:
    table = Table(title=title)
    table.add_column("form")
    for rate in results:
        table.add_column(f"lr {rate:g}: Pearson", justify="right")
        table.add_column("Spearman", justify="right")
        table.add_column("RMSE", justify="right")
        table.add_column("relative", justify="right")
    for form in FORMS:
        cells = []
        for found, _ in results.values():
            rows = np.array(found[form])
            pearson, spearman, rmse, relative = rows.mean(0)
            cells += [f"{pearson:.4f}", f"{spearman:.4f}", f"{rmse:.2e}", f"{relative:.4f}"]
        table.add_row(form, *cells)
    Console(width=200).print(table)
    for rate, (_, error) in results.items():
        print(f"lr {rate:g}: largest standard error of a true value, over their root mean square: {error:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lm", type=float, nargs="*", default=LM_RATES, help="learning rates of the language model")
    parser.add_argument("--two-layers", type=float, nargs="*", default=TWO_LAYER_RATES)
    chosen = parser.parse_args()
    if chosen.two_layers:
        show(
            f"two-layer model, all subsets of 8 samples, {len(TWO_LAYER_STEPS)} steps",
            {rate: two_layers(rate) for rate in chosen.two_layers},
        )
    if chosen.lm:
        show(
            f"language model, {PERMUTATIONS} permutations of {BATCH} samples, steps {LM_STEPS}",
            {rate: language_model(rate) for rate in chosen.lm},
        )
