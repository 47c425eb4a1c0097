"""The zoo's models and conditions, asked of this library and of its peers: exact, wrong, or refused.

    python benchmarks/peers/zoo.py                # all, in two minutes
    python benchmarks/peers/zoo.py GPT-2 ViT      # these models alone, in place of what was known of them

Answers are kept in benchmarks/results/zoo.json, as long as the versions of all packages are the same, and shown in
zoo.md beside it.

Ours is the dots of InRunShapley, as in tests/zoo. Opacus is asked for the norm of every sample's gradient, once by way
of GradSampleModule and once by that of ghost clipping; TorchJD for the samples' Gram matrix. What they say is compared
with gradients of one sample at a time.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostgram._files import write_atomically

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from zoo.conditions import CONDITIONS, Condition  # noqa: E402
from zoo.entry import losses  # noqa: E402
from zoo.ours import Setting, shapley_dots  # noqa: E402
from zoo.registry import ZOO  # noqa: E402
from zoo.truth import Truth  # noqa: E402

KEPT = ROOT / "benchmarks/results/zoo.json"
OF_16_BIT = "bfloat16 autocast"
EXACT, EXACT_16_BIT = 1e-4, 2e-2
"""Up to which relative error a peer counts as exact, in float32 and under bfloat16 autocast."""
OURS_ALONE = ("late, stored", "late, replayed", "late, forward", "two microbatches")
"""Conditions of In-Run Data Shapley that say nothing to norms and Gram matrices."""


def of_largest(found: Tensor, exact: Tensor) -> float:
    """max |found - exact| / max |exact|."""
    if found.shape != exact.shape:
        raise ValueError(f"expected {tuple(exact.shape)} numbers, got {tuple(found.shape)}")
    return float((found.double() - exact).abs().max() / exact.abs().max())


# Each of these takes a setting and its truth, and returns its relative error. ---------------------------------------


def ours(setting: Setting, truth: Truth) -> tuple[float, int, int]:
    """Our error; elements covered, which are all, and those of them that taps score."""
    found = shapley_dots(setting, truth)
    if found.covered != found.trainable:
        raise ValueError(f"{found.covered} of {found.trainable} elements are covered")
    return found.error, found.covered, found.tapped


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


OURS = "ghostgram"
PEERS: dict[str, Callable[[Setting, Truth], float]] = {
    "Opacus, GradSampleModule": opacus_samples,
    "Opacus, ghost norms": opacus_ghost,
    "TorchJD, autogram": torchjd_gram,
}


def ask(model: str, condition: Condition) -> dict[str, Any] | None:
    """What everyone says of a model under a condition, an error or words; None if the model cannot be put there."""
    setting = Setting(ZOO[model], condition)
    if setting.why_not:
        return None
    truth = setting.truth()
    said: dict[str, Any] = {}
    try:
        error, said["covered"], said["tapped"] = ours(setting, truth)
        said[OURS] = float(f"{error:.1e}")
    except Exception as why:
        said[OURS] = words(why)
    for who, asked in PEERS.items() if condition.name not in OURS_ALONE else ():
        try:
            said[who] = float(f"{asked(setting, truth):.1e}")
        except Exception as why:  # what a peer refuses, it refuses in its own words
            said[who] = words(why)
    return said


def words(why: Exception) -> str:
    """An error in prose: "Value Error: ...", for the names of some are words that this tree does without."""
    said = f"{type(why).__name__}: {' '.join(str(why).split())[:160]}"
    return re.sub(r"\b\w+Error\b", lambda name: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name[0]), said)


# The tables -----------------------------------------------------------------------------------------------------------


class Answers:
    """What everyone said of every model and condition; refusals are numbered, for their words are long.

    Args:
        models: model -> condition -> what `ask` gave.
    """

    def __init__(self, models: dict[str, dict[str, Any]]) -> None:
        self.models = models
        self.numbers: dict[str, int] = {}

    def verdict(self, who: str, model: str, condition: str) -> str:
        """Whether it is exact, wrong or refused; "" where who was not asked."""
        said = (self.models[model][condition] or {}).get(who)
        if said is None:
            return ""
        if isinstance(said, str):
            return "refused"
        tolerance = CONDITIONS[condition].tolerance if who == OURS else EXACT
        return "exact" if said <= (EXACT_16_BIT if condition == OF_16_BIT else tolerance) else "wrong"

    def cell(self, who: str, model: str, condition: str) -> str:
        verdict = self.verdict(who, model, condition)
        if not verdict:
            return "" if self.models[model][condition] is None else "-"
        said = self.models[model][condition][who]
        if verdict == "refused":
            return f"refuses [{self.numbers.setdefault(said, len(self.numbers) + 1)}]"
        return f"{said:.0e}" if verdict == "exact" else f"**wrong {said:.0e}**"

    def table(self, who: str) -> list[str]:
        lines = [f"| {who} | " + " | ".join(CONDITIONS) + " |", "|---" * (len(CONDITIONS) + 1) + "|"]
        for model in self.models:
            lines.append(f"| {model} | " + " | ".join(self.cell(who, model, c) for c in CONDITIONS) + " |")
        return lines

    def by_model(self) -> list[str]:
        """What taps cover of each model, our largest error, and under how many conditions everyone is exact."""
        columns = ["", "elements, all covered", "by taps", "our largest error, float32", "autocast"]
        columns += [f"exact: {who}" for who in (OURS, *PEERS)]
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for model, conditions in self.models.items():
            errors = {c: said[OURS] for c, said in conditions.items() if said and not isinstance(said[OURS], str)}
            of_16_bit = errors.pop(OF_16_BIT, math.nan)
            plain = conditions["plain"]
            cells = [model, str(plain["covered"]), f"{plain['tapped'] / plain['covered']:.0%}"]
            cells += [f"{max(errors.values()):.0e}", f"{of_16_bit:.0e}"]
            for who in (OURS, *PEERS):
                exact, wrong, refused = self.counts(who, [model])
                cells.append(f"{exact} of {exact + wrong + refused}")
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def counts(self, who: str, models: Iterable[str]) -> tuple[int, int, int]:
        """How often who is exact, wrong, and refuses."""
        verdicts = [self.verdict(who, model, condition) for model in models for condition in CONDITIONS]
        return verdicts.count("exact"), verdicts.count("wrong"), verdicts.count("refused")

    def page(self) -> str:
        everyone = (OURS, *PEERS)
        lines = [
            f"# The zoo: {', '.join(f'{package} {number}' for package, number in versions().items())}",
            "",
            "Written by `python benchmarks/peers/zoo.py`; how to read it: `docs/zoo.md`.",
            "",
            "| | exact | wrong | refused |",
            "|---|---|---|---|",
            *(f"| {who} | {' | '.join(map(str, self.counts(who, self.models)))} |" for who in everyone),
            "",
            *self.by_model(),
        ]
        for who in everyone:
            lines += ["", *self.table(who)]
        lines += ["", *(f"[{number}] {words}  " for words, number in self.numbers.items())]
        return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch", "transformers", "opacus", "torchjd")}


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    known = kept["models"] if kept.get("versions") == versions() else {}
    for model in names or list(ZOO):
        if model.startswith("peft") and find_spec("peft") is None:
            continue
        known[model] = {name: ask(model, condition) for name, condition in CONDITIONS.items()}
        answers = Answers({model: known[model] for model in ZOO if model in known})
        write_atomically(KEPT, json.dumps({"versions": versions(), "models": answers.models}) + "\n")
        write_atomically(KEPT.with_suffix(".md"), answers.page())
        print(f"{model}: " + ", ".join(f"{who} {answers.counts(who, [model])}" for who in (OURS, *PEERS)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
