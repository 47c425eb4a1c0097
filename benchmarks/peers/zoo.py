"""The zoo's models and conditions, asked of this library and of its peers: exact, wrong, or refused.

    python benchmarks/peers/zoo.py                # all, in two minutes; writes benchmarks/results/zoo.md
    python benchmarks/peers/zoo.py GPT-2 ViT      # these models alone; prints and writes nothing

Ours is the dots of InRunShapley, as in tests/zoo. Opacus is asked for the norm of every sample's gradient, once by way
of GradSampleModule and once by that of ghost clipping; TorchJD for the samples' Gram matrix. What they say is compared
with gradients of one sample at a time.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from zoo.conditions import CONDITIONS  # noqa: E402
from zoo.entry import losses  # noqa: E402
from zoo.ours import Setting, shapley_dots  # noqa: E402
from zoo.registry import ZOO  # noqa: E402
from zoo.truth import Truth  # noqa: E402

RESULT = ROOT / "benchmarks/results/zoo.md"
EXACT, EXACT_16_BIT = 1e-4, 2e-2
"""Up to which relative error a peer counts as exact, in float32 and under bfloat16 autocast."""
ELEMENTS: dict[str, tuple[int, int]] = {}
"""Model -> elements covered of all its parameters, and those of them that taps score."""
OURS_ALONE = ("late, stored", "late, replayed", "late, forward", "two microbatches")
"""Conditions of In-Run Data Shapley that say nothing to norms and Gram matrices."""


def of_largest(found: Tensor, exact: Tensor) -> float:
    """max |found - exact| / max |exact|."""
    if found.shape != exact.shape:
        raise ValueError(f"expected {tuple(exact.shape)} numbers, got {tuple(found.shape)}")
    return float((found.double() - exact).abs().max() / exact.abs().max())


# Each of these takes a setting and its truth, and returns its relative error. ---------------------------------------


def ours(setting: Setting, truth: Truth) -> float:
    found = shapley_dots(setting, truth)
    if found.covered != found.trainable:
        raise ValueError(f"{found.covered} of {found.trainable} elements are covered")
    if setting.condition.name == "plain":
        ELEMENTS[setting.entry.name] = found.covered, found.tapped
    return found.error


def opacus_samples(setting: Setting, truth: Truth) -> float:
    """Norms of the gradients that GradSampleModule keeps for every sample."""
    from opacus import GradSampleModule

    model = setting.model()
    wrapped = GradSampleModule(model, loss_reduction="sum")
    with setting.condition.context():
        losses(wrapped, setting.batch).sum().backward()
    reached = [p for p in model.parameters() if p.grad is not None]
    if missing := sum(p.grad_sample is None for p in reached):
        raise ValueError(f"{missing} of {len(reached)} parameters got no gradient per sample")  # as its optimizer would
    squares = [p.grad_sample.double().flatten(1).pow(2).sum(1) for p in reached]
    return of_largest(torch.stack(squares).sum(0).sqrt(), truth.gradients.norm(dim=1))


def opacus_ghost(setting: Setting, truth: Truth) -> float:
    """Norms from ghost clipping's first backward."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model = setting.model()
    wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", use_ghost_clipping=True)
    with setting.condition.context():
        losses(wrapped, setting.batch).sum().backward()
    norms = [p._norm_sample for p in model.parameters() if p.grad is not None]
    return of_largest(torch.stack(norms).double().norm(dim=0), truth.gradients.norm(dim=1))


def torchjd_gram(setting: Setting, truth: Truth) -> float:
    from torchjd.autogram import Engine

    model = setting.model()
    engine = Engine(model, batch_dim=0)
    with setting.condition.context():
        gram = engine.compute_gramian(losses(model, setting.batch))
    return of_largest(gram, truth.gradients @ truth.gradients.T)


ASKED: dict[str, Callable[[Setting, Truth], float]] = {
    "ghostgram": ours,
    "Opacus, GradSampleModule": opacus_samples,
    "Opacus, ghost norms": opacus_ghost,
    "TorchJD, autogram": torchjd_gram,
}


# The tables -----------------------------------------------------------------------------------------------------------


class Answers:
    """What everyone said, by who was asked, model and condition; refusals are numbered, for their words are long."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str, str], str] = {}
        self.errors: dict[tuple[str, str, str], float] = {}
        """Those of the cells that are exact."""
        self.words: dict[str, int] = {}

    def ask(self, who: str, setting: Setting, truth: Truth) -> str:
        name, condition = setting.entry.name, setting.condition
        if who != "ghostgram" and condition.name in OURS_ALONE:
            cell = "-"
        else:
            tolerance = condition.tolerance if who == "ghostgram" else EXACT
            tolerance = EXACT_16_BIT if condition.name == "bfloat16 autocast" else tolerance
            try:
                error = ASKED[who](setting, truth)
                cell = f"**wrong {error:.0e}**"
                if error <= tolerance:
                    cell, self.errors[who, name, condition.name] = f"{error:.0e}", error
            except Exception as why:  # what a peer refuses, it refuses in its own words
                words = f"{type(why).__name__}: {' '.join(str(why).split())[:160]}"
                cell = f"refuses [{self.words.setdefault(words, len(self.words) + 1)}]"
        self.cells[who, name, condition.name] = cell
        return cell

    def table(self, who: str, models: list[str]) -> list[str]:
        counts = ["elements covered", "by taps"] if who == "ghostgram" else []
        lines = [f"| {who} | " + " | ".join([*counts, *CONDITIONS]) + " |"]
        lines.append("|---" * (len(counts) + len(CONDITIONS) + 1) + "|")
        for model in models:
            cells = ["", ""] if counts else []
            if counts and model in ELEMENTS:
                covered, tapped = ELEMENTS[model]
                cells = [f"{covered} of {covered}", f"{tapped / covered:.0%}"]
            lines.append(f"| {model} | " + " | ".join(cells + [self.cells[who, model, c] for c in CONDITIONS]) + " |")
        return lines

    def by_model(self, models: list[str]) -> list[str]:
        """Our largest error over a model's conditions, and in how many of them everyone is exact."""
        columns = ["", "elements, all covered", "by taps", "our largest error, float32", "autocast"]
        lines = [f"| {' | '.join([*columns, *(f'exact: {who}' for who in ASKED)])} |"]
        lines.append("|---" * (len(columns) + len(ASKED)) + "|")
        for model in models:
            covered, tapped = ELEMENTS.get(model, (0, math.nan))
            errors = {c: error for (who, name, c), error in self.errors.items() if (who, name) == ("ghostgram", model)}
            of_16_bit = errors.pop("bfloat16 autocast", math.nan)
            cells = [model, str(covered), f"{tapped / max(covered, 1):.0%}"]
            cells += [f"{max(errors.values(), default=math.nan):.0e}", f"{of_16_bit:.0e}"]
            for who in ASKED:
                exact = sum(key[:2] == (who, model) for key in self.errors)
                cells.append(f"{exact} of {len(self.said(who, model))}")
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def said(self, who: str, model: str | None = None) -> list[str]:
        """What someone was asked and answered, of one model or of all."""
        return [
            cell
            for (asked, name, _), cell in self.cells.items()
            if asked == who and model in (None, name) and cell not in ("", "-")
        ]

    def count(self, who: str) -> str:
        cells = self.said(who)
        wrong, refused = (sum(word in cell for cell in cells) for word in ("wrong", "refuses"))
        return f"| {who} | {len(cells) - wrong - refused} | {wrong} | {refused} |"


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    answers, models = Answers(), names or list(ZOO)
    if find_spec("peft") is None:
        models = [model for model in models if not model.startswith("peft")]
    for model in models:
        for condition in CONDITIONS.values():
            setting = Setting(ZOO[model], condition)
            if setting.why_not:
                answers.cells |= {(who, model, condition.name): "" for who in ASKED}
                continue
            truth = setting.truth()
            said = [f"{who} {answers.ask(who, setting, truth)}" for who in ASKED]
            print(f"{model}, {condition.name}: " + "; ".join(said), flush=True)
    text = page(answers, models)
    print(text)
    if not names:
        RESULT.write_text(text)


def page(answers: Answers, models: list[str]) -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "opacus", "torchjd"))
    lines = [
        f"# The zoo: {versions}",
        "",
        "Written by `python benchmarks/peers/zoo.py`; how to read it: `docs/zoo.md`.",
        "",
        "| | exact | wrong | refused |",
        "|---|---|---|---|",
        *(answers.count(who) for who in ASKED),
        "",
        *answers.by_model(models),
    ]
    for who in ASKED:
        lines += ["", *answers.table(who, models)]
    lines += ["", *(f"[{number}] {words}  " for words, number in answers.words.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
