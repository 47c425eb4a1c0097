"""Velocitune beside static weights, DoReMi and DBL on four kinds of real text, at equal tokens and at equal compute.

    python benchmarks/algorithms/velocitune_experiment.py             # half an hour on one core
    python benchmarks/algorithms/velocitune_experiment.py --table
    python benchmarks/algorithms/velocitune_experiment.py --figure experiment.png

A small byte model that knows prose goes on with code, headers, manual pages and licences, in the shares of `Settings`.
The base is one; a seed is of everything after it: which windows are trained on, their order, and which windows of
held-out documents rules see the losses of. Arms are judged by other windows, once, at their end. At equal compute
whatever an arm costs beside its own training (proxy and reference runs, evaluations) shortens it.

A run may be killed at any moment and called again: it goes on with the arm that it was at. Rows are kept in
benchmarks/results/velocitune/experiment.json as they come.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from velocitune_runs import (
    Clock,
    Rows,
    Settings,
    Texts,
    Trained,
    base,
    doremi_weights,
    fitted,
    learn,
    measured,
    new_model,
    pair,
    parameters_of,
    reweighted,
)
from velocitune_tables import Found, draw, text

from ghostgram.algorithms.velocitune import ledger
from ghostgram.algorithms.velocitune.loader import DynamicMixture
from ghostgram.algorithms.velocitune.proxy import proxy_sizes
from ghostgram.algorithms.velocitune.replay import replay
from ghostgram.algorithms.velocitune.rules.base import Reweighter
from ghostgram.algorithms.velocitune.rules.dbl import DBL
from ghostgram.algorithms.velocitune.rules.static import Static
from ghostgram.algorithms.velocitune.rules.velocitune import Velocitune
from ghostgram.algorithms.velocitune.targets import Targets

RESULTS = Path(__file__).parent.parent / "results/velocitune/experiment.json"
TOKENS = ("static", "uniform", "doremi", "dbl", "paper", "robust", "none", "perfect", "average", "shuffled")
COMPUTE = ("doremi", "dbl", "paper", "robust", "none")
"""Arms that their costs shorten. Static ones have none; perfect targets cost a whole static run, which leaves nothing
to train on; and replays are of a run that must be there already, so they are no way of training."""
REPLAYED = "paper"


def sizes(settings: Settings) -> list[int]:
    """Steps of the proxy runs, from 1/24 to 1/6 of the run's."""
    return proxy_sizes(settings.steps, smallest=1 / 24, largest=1 / 6)


def reference_steps(settings: Settings) -> int:
    """Of DoReMi's reference run, and of its proxy run."""
    return math.ceil(settings.doremi * settings.steps)


def overheads(settings: Settings, parameters: int) -> dict[str, ledger.Overhead]:
    """What each arm costs beside its own training."""
    shown = len(settings.shares) * settings.control * (settings.length - 1)  # tokens whose losses are counted
    one, proxies = ledger.forward(parameters, shown), sum(sizes(settings)) * settings.row_tokens
    stage1 = ledger.velocitune(parameters, proxies, shown, settings.every)
    stage1 = replace(stage1, fixed=stage1.fixed + len(sizes(settings)) * one)
    once = reference_steps(settings) * settings.row_tokens
    static = ledger.training(parameters, settings.steps * settings.row_tokens)
    dbl = ledger.dbl(
        parameters, shown, settings.every, stage1.fixed
    )  # it measures l_init too: targets are fitted by it
    return {
        "static": ledger.Overhead(), "uniform": ledger.Overhead(), "doremi": ledger.doremi(parameters, once, once),
        "dbl": dbl, "paper": stage1, "robust": stage1, "none": ledger.velocitune(parameters, 0, shown, settings.every),
        "perfect": ledger.Overhead(static + 2 * one, one, settings.every),
    }  # fmt: skip


class Experiment:
    """Every arm of every seed, as far as it is not done.

    Args:
        settings: Of all arms.
        results: The file of rows.
        folder: For the base and the schedules that are replayed.
    """

    def __init__(self, settings: Settings, results: Path, folder: Path) -> None:
        self.settings, self.results, self.folder = settings, results, folder
        self.found = {"settings": json.loads(json.dumps(asdict(settings))), "rows": {}}
        if results.exists():
            found = json.loads(results.read_text())
            if found["settings"] != self.found["settings"]:
                raise ValueError(f"results: expected settings {self.found['settings']}, got {found['settings']}")
            self.found = found
        self.parameters = parameters_of(new_model(settings))

    @cached_property
    def texts(self) -> Texts:
        return Texts(self.settings)

    @cached_property
    def base(self) -> Any:
        return base(self.settings, self.texts, self.folder / "base.pt")

    def run(self) -> None:
        """All that is missing, in an order in which the first seeds are whole before later ones begin."""
        if "base" not in self.found["rows"]:
            self._keep("base", {"judge": pair(measured(self.base, self.texts.judge)), "texts": self.texts.digest()})
        for seed in range(self.settings.seeds):
            for key, what in self._of(seed):
                if f"{seed} {key}" not in self.found["rows"] or not self._replayable(seed, key):
                    self._keep(f"{seed} {key}", what(seed, key.removeprefix("compute ")))
                    print(seed, key, flush=True)

    def _of(self, seed: int) -> Iterator[tuple[str, Any]]:
        yield "proxies", self.proxies
        yield "doremi-proxy", self.doremi_proxy
        for arm in TOKENS:
            yield arm, self.replayed if arm in ("average", "shuffled") else self.arm
        for arm in COMPUTE:
            yield f"compute {arm}", self.shortened

    def _replayable(self, seed: int, key: str) -> bool:
        """Whether a run that is to be replayed has left its schedule here."""
        whole = {f"{seed} {arm}" for arm in ("average", "shuffled")} <= set(self.found["rows"])
        return key != REPLAYED or whole or self._schedule(seed).exists()

    def _schedule(self, seed: int) -> Path:
        return self.folder / f"{seed}-{REPLAYED}.json"

    def _keep(self, key: str, row: dict[str, Any]) -> None:
        self.found["rows"][key] = row
        lines = [f" {json.dumps(name)}: {json.dumps(rounded(each))}" for name, each in self.found["rows"].items()]
        text = f'{{"settings": {json.dumps(self.found["settings"])},\n"rows": {{\n' + ",\n".join(lines) + "\n}}\n"
        self.results.parent.mkdir(parents=True, exist_ok=True)
        (unfinished := self.results.with_suffix(".new")).write_text(text)
        unfinished.rename(self.results)
        self.found = json.loads(text)

    # Runs ------------------------------------------------------------------------------------------------------------

    def proxies(self, seed: int, key: str) -> dict[str, Any]:
        """Stage 1: short runs by the shares of the data; measured for the rules, and for the yardstick of the judge."""
        control, points, clock = self.texts.control(seed), {}, Clock()
        for steps in sizes(self.settings):
            made = self._static(seed, steps)
            points[str(steps)] = {"control": pair(measured(made.model, control)), "judge": self._judged(made.model)}
            clock |= {part: clock.get(part, 0.0) + value for part, value in made.clock.items()}
        return {"start": pair(measured(self.base, control)), "points": points, "seconds": clock}

    def doremi_proxy(self, seed: int, key: str) -> dict[str, Any]:
        """The reference by the shares of the data, then the proxy; both begin at the base, as the main run does."""
        steps = reference_steps(self.settings)
        reference = self._static(seed, steps)
        training = self.texts.training(seed)
        made, clock, course = doremi_weights(
            copy.deepcopy(self.base), reference.model, training, steps, self.settings, seed
        )
        seconds = {"reference": sum(reference.clock.values()), "proxy": sum(clock.values())}
        return {"mean": made.rule.mean_weights.tolist(), "weights": course[:: max(1, steps // 50)], "seconds": seconds}

    def arm(self, seed: int, arm: str, steps: int | None = None) -> dict[str, Any]:
        """One arm, by default on as many tokens as static weights."""
        steps = self.settings.steps if steps is None else steps
        rule = self._rule(seed, arm, steps * self.settings.row_tokens)
        made = reweighted(
            copy.deepcopy(self.base), self.texts.training(seed), self.texts.control(seed), rule, steps, self.settings,
            seed,
        )  # fmt: skip
        row = self._row(made.model, made.mixture, made.clock, arm, steps)
        if arm == "static":
            row["control"] = pair(measured(made.model, self.texts.control(seed)))
        if arm == REPLAYED and steps == self.settings.steps:
            made.controller.export().save(self._schedule(seed))
        if targets := getattr(rule, "targets", None):
            row |= {"targets": targets.loss.tolist(), "flags": [list(t.flags) for t in targets.by_domain.values()]}
        evaluations = made.controller.ledger.flops["evaluate"]
        return row | {"evaluations": evaluations}

    def shortened(self, seed: int, arm: str) -> dict[str, Any]:
        """One arm on what its costs leave of the static arm's FLOPs."""
        s = self.settings
        arms = ledger.equal_compute({arm: overheads(s, self.parameters)[arm]}, s.steps, s.row_tokens, self.parameters)
        return self.arm(seed, arm, arms[arm].batches)

    def replayed(self, seed: int, kind: str) -> dict[str, Any]:
        """The schedule of a run again, by its mean weights or in another order."""
        schedule = replay(json.loads(self._schedule(seed).read_text())["run"], kind, seed=seed).schedule
        mixture, model, clock = DynamicMixture(self.texts.training(seed), schedule), copy.deepcopy(self.base), Clock()
        learn(model, mixture, self.settings.steps, self.settings, clock)
        return self._row(model, mixture, clock, REPLAYED, self.settings.steps)

    def _static(self, seed: int, steps: int) -> Trained:
        training: Rows = self.texts.training(seed)
        return reweighted(copy.deepcopy(self.base), training, {}, Static(), steps, self.settings, seed)

    def _rule(self, seed: int, arm: str, tokens: int) -> Reweighter:
        rows = self.found["rows"]
        names, start = list(self.settings.shares), rows[f"{seed} proxies"]["start"]
        if arm in ("static", "uniform"):
            return Static("proportional" if arm == "static" else "uniform")
        if arm == "doremi":
            return Static.of(rows[f"{seed} doremi-proxy"]["mean"])
        if arm == "perfect":
            loss, se = rows[f"{seed} static"]["control"]
            given = Targets.given(names, start[0], loss, se_init=start[1], se_target=se, form="perfect")
            return Velocitune(given, "paper")
        if arm == "none":
            return Velocitune(Targets.given(names, start[0], np.zeros(len(names)), se_init=start[1]), "paper")
        targets = fitted(self.settings, rows[f"{seed} proxies"], "control", start, tokens)
        return DBL(targets, "code") if arm == "dbl" else Velocitune(targets, arm, budget=tokens)

    def _judged(self, model: Any) -> list[list[float]]:
        return pair(measured(model, self.texts.judge))

    def _row(self, model: Any, mixture: DynamicMixture, clock: Clock, arm: str, steps: int) -> dict[str, Any]:
        loss, se = self._judged(model)
        overhead = overheads(self.settings, self.parameters)[arm]
        flops = {
            "train": ledger.training(self.parameters, steps * self.settings.row_tokens),
            "before": overhead.fixed, "updates": overhead.of(steps) - overhead.fixed,
        }  # fmt: skip
        weights = [[version.first, version.shares.tolist()] for version in mixture.schedule.history]
        draws = mixture.schedule.cursors.tolist()
        return {
            "steps": steps, "loss": loss, "se": se, "draws": draws, "weights": weights, "flops": flops,
            "seconds": dict(clock),
        }  # fmt: skip


def rounded(tree: Any) -> Any:
    """The same with numbers of seven digits: more than anything here is certain by."""
    if isinstance(tree, dict):
        return {name: rounded(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    return float(f"{tree:.7g}") if isinstance(tree, float) else tree


def main(arguments: list[str] | None = None, settings: Settings | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=Path("build/velocitune-experiment"))
    parser.add_argument("--table", action="store_true", help="print what was found, and do nothing")
    parser.add_argument("--figure", type=Path, help="draw what was found, and do nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    experiment = Experiment(settings or Settings(), options.results, options.folder)
    if options.table or options.figure:
        found = Found(experiment.settings, experiment.found["rows"])
        if options.table:
            print(text(found))
        if options.figure:
            draw(found, options.figure)
    else:
        experiment.run()


if __name__ == "__main__":
    main()
