"""What the experiment on Velocitune has found, as Markdown tables and as a figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from velocitune_runs import Settings, fitted

from ghostgram.algorithms.velocitune.replay import Difference, compare_orders
from ghostgram.report.canvas import canvas, save
from ghostgram.report.palette import LIGHT, series

F64 = NDArray[np.float64]
ARMS = ("static", "uniform", "doremi", "dbl", "paper", "robust", "none", "perfect", "average", "shuffled")
SHOWN = {
    "paper": "Velocitune, `paper`", "robust": "Velocitune, `robust`", "none": "`paper`, no targets (0)",
    "perfect": "`paper`, perfect targets", "average": "static average of `paper`", "shuffled": "`paper`, shuffled",
    "doremi": "DoReMi", "dbl": "DBL", "static": "static, proportional", "uniform": "uniform",
}  # fmt: skip
MEASURES = ("mean", "mean by shares", "std of gaps", "worst gap", "std to the best", "worst to the best")
"""Beside the domains' losses: their means, plain and by the domains' shares of the data; and of what remains of the way
to the predicted targets, and to the least loss that any arm has reached at equal tokens, the standard deviation over
domains and the worst."""


class Found:
    """The rows of the seeds that are whole.

    Args:
        settings: Of the experiment.
        rows: As they are kept.
    """

    def __init__(self, settings: Settings, rows: dict[str, Any]) -> None:
        self.settings, self.rows, self.domains = settings, rows, list(settings.shares)
        last = "compute none"
        self.seeds = [seed for seed in range(settings.seeds) if f"{seed} {last}" in rows]
        if not self.seeds:
            raise ValueError(f"rows: expected those of a whole seed, got {len(rows)} rows of none")

    def row(self, seed: int, arm: str, compute: bool = False) -> dict[str, Any]:
        """At equal compute arms without costs are those at equal tokens."""
        shortened = self.rows.get(f"{seed} compute {arm}") if compute else None
        return dict(shortened or self.rows[f"{seed} {arm}"])

    def arms(self, compute: bool) -> list[str]:
        return [arm for arm in ARMS if not compute or arm in ("static", "uniform") or self._is_shortened(arm)]

    def _is_shortened(self, arm: str) -> bool:
        return f"{self.seeds[0]} compute {arm}" in self.rows

    @cached_property
    def yardstick(self) -> dict[int, F64]:
        """By seed, (2, K): losses of the base, and those that the proxy runs predict static weights to end at."""
        tokens, start = self.settings.steps * self.settings.row_tokens, self.rows["base"]["judge"]
        targets = {
            seed: fitted(self.settings, self.rows[f"{seed} proxies"], "judge", start, tokens) for seed in self.seeds
        }
        return {seed: np.stack([found.l_init, found.loss]) for seed, found in targets.items()}

    @cached_property
    def best(self) -> F64:
        """(K,) least loss of any arm, mean of seeds."""
        losses = [[self.row(seed, arm)["loss"] for seed in self.seeds] for arm in ARMS]
        return np.asarray(np.mean(losses, axis=1).min(0))

    def measures(self, arm: str, compute: bool) -> F64:
        """(seeds, K + 6): losses of the domains, and `MEASURES`."""
        found, shares = [], list(self.settings.shares.values())
        for seed in self.seeds:
            loss = np.array(self.row(seed, arm, compute)["loss"])
            start, target = self.yardstick[seed]
            each = [loss.mean(), loss @ shares]
            for end in (target, self.best):
                gaps = (loss - end) / (start - end)  # 1 at the start, 0 at the end, negative beyond it
                each += [gaps.std(), gaps.max()]
            found.append([*loss, *each])
        return np.array(found)


def text(found: Found) -> str:
    """All tables."""
    names = [*found.domains, *MEASURES]
    parts = [f"{len(found.seeds)} seeds; mean and 95 % interval over seeds by Student's t"]
    for compute in (False, True):
        arms = found.arms(compute)
        at = "compute" if compute else "tokens"
        rows = []
        for arm in arms:
            steps = str(found.row(found.seeds[0], arm, compute)["steps"])
            rows.append([SHOWN[arm], steps, *map(mean_and_interval, found.measures(arm, compute).T)])
        parts += [f"Losses at equal {at}, nats per byte", table(["arm", "steps", *names], rows)]
        parts += [
            f"Differences to static weights at equal {at}, with bootstrap intervals",
            differences(found, [(arm, "static") for arm in arms[1:]], compute),
        ]
    ordering = [("paper", "average"), ("paper", "shuffled"), ("paper", "dbl"), ("robust", "paper"), ("paper", "none")]
    parts += ["Other pairs at equal tokens", differences(found, ordering, compute=False)]
    parts += ["Standard errors of a loss, by windows of the judge", table(found.domains, [standard_errors(found)])]
    parts += [
        "FLOPs, in % of the static arm's",
        costs(found),
        "CPU seconds, in % of the arm's training",
        overhead(found),
    ]
    parts += ["Weights: first, mean and last over the run; epochs", courses(found)]
    parts += ["Targets of the rules, beside what static weights reached on the same windows", predictions(found)]
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_interval(values: Sequence[float] | F64) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


def differences(found: Found, pairs: Sequence[tuple[str, str]], compute: bool) -> str:
    """Of each pair the first less the second."""
    names = [*found.domains, *MEASURES]
    if len(found.seeds) < 3:
        return "(three seeds at least)"
    rows = []
    for ours, theirs in pairs:
        made = compare_orders(names, found.measures(ours, compute), found.measures(theirs, compute))
        rows.append([f"{SHOWN[ours]} - {SHOWN[theirs]}", *map(difference, made)])
    return table(["", *names], rows)


def difference(made: Difference) -> str:
    return f"{made.mean:+.3f} [{made.low:+.3f}, {made.high:+.3f}] {made.verdict}"


def standard_errors(found: Found) -> list[str]:
    errors = [found.row(seed, arm)["se"] for seed in found.seeds for arm in found.arms(compute=False)]
    return [f"{error:.3f}" for error in np.mean(errors, axis=0)]


def costs(found: Found) -> str:
    """What is planned and, of evaluations, what was booked: the same, or the tables would not be at equal compute."""
    whole = found.row(found.seeds[0], "static")["flops"]["train"]
    rows = []
    for compute in (False, True):
        for arm in found.arms(compute):
            row = found.row(found.seeds[0], arm, compute)
            parts = [row["flops"][part] for part in ("train", "before", "updates")]
            shares = [f"{100 * part / whole:.1f}" for part in [*parts, sum(parts)]]
            rows.append([SHOWN[arm], "compute" if compute else "tokens", str(row["steps"]), *shares])
    return table(["arm", "equal", "steps", "training", "before it", "evaluations on the way", "all"], rows)


def overhead(found: Found) -> str:
    """Of runs on all tokens; the median over seeds, by CPU time."""
    rows = []
    for arm in found.arms(compute=False):
        parts = []
        for seed in found.seeds:
            row = found.row(seed, arm)
            train, *others = (row["seconds"].get(part, 0.0) for part in ("train", "sample", "control", "evaluate"))
            parts.append([1e3 * train / row["steps"], *(100 * each / train for each in others)])
        step, sample, control, evaluate = np.median(parts, axis=0)
        of = (sample, control, sample + control, evaluate, sample + control + evaluate)
        rows.append([SHOWN[arm], f"{step:.1f}", *(f"{each:.1f}" for each in of)])
    parts_of = ["sampler and loader", "controller", "both", "evaluations", "all"]
    return table(["arm", "a training step, ms", *parts_of], rows)


def shares_by_step(row: dict[str, Any]) -> F64:
    """(steps, K) weights in force."""
    first = [begin for begin, _ in row["weights"]]
    lengths = np.diff([*first, row["steps"]])
    return np.repeat(np.array([shares for _, shares in row["weights"]]), lengths, axis=0)


def mean_course(found: Found, arm: str) -> F64:
    """(steps, K) mean over seeds."""
    return np.asarray(np.mean([shares_by_step(found.row(seed, arm)) for seed in found.seeds], axis=0))


def courses(found: Found) -> str:
    sizes = np.array(list(found.settings.shares.values())) * found.settings.steps * found.settings.batch
    rows = []
    for arm in found.arms(compute=False):
        course = mean_course(found, arm)
        epochs = np.mean([found.row(seed, arm)["draws"] for seed in found.seeds], axis=0) / sizes
        of = zip(course[0], course.mean(0), course[-1], epochs, strict=True)
        moved = statistics.fmean(
            np.abs(np.diff(shares_by_step(found.row(seed, arm)), axis=0)).sum() for seed in found.seeds
        )
        rows.append([SHOWN[arm], *(f"{a:.2f} {b:.2f} {c:.2f}; {e:.2f}" for a, b, c, e in of), f"{moved:.2f}"])
    return table(["arm", *found.domains, "sum of changes"], rows)


def predictions(found: Found) -> str:
    targets = np.array([found.row(seed, "paper")["targets"] for seed in found.seeds])
    reached = np.array([found.row(seed, "static")["control"][0] for seed in found.seeds])
    start = np.array([found.rows[f"{seed} proxies"]["start"][0] for seed in found.seeds])
    flags = [sum(bool(found.row(seed, "paper")["flags"][k]) for seed in found.seeds) for k in range(len(found.domains))]
    rows = [
        [
            name,
            *(mean_and_interval(column[:, k]) for column in (start, targets, reached, targets - reached)),
            str(flags[k]),
        ]
        for k, name in enumerate(found.domains)
    ]
    return table(["domain", "before", "target", "reached", "target - reached", "seeds with a flag"], rows)


def draw(found: Found, path: Path) -> None:
    """Weights over time, mean of seeds; below, losses at the end beside the targets that proxy runs predict."""
    arms = found.arms(compute=False)
    with canvas(11.5, 8.6) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=(4, 3))
        for axes, arm in zip(above.subplots(2, 5, sharex=True, sharey=True).flat, arms, strict=True):
            course = mean_course(found, arm)
            for k, name in enumerate(found.domains):
                axes.step(np.arange(len(course)), course[:, k], where="post", color=LIGHT[series(k)], label=name)
            axes.set_title(plain(arm), fontsize=9)
            axes.set(ylim=(0, 1), xlim=(0, len(course)))
        above.supylabel("weight, mean of seeds", fontsize=9, color=LIGHT["muted"])
        above.supxlabel("step", fontsize=9, color=LIGHT["muted"])
        above.legend(*above.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(found.domains))
        row = below.subplots(1, len(found.domains))
        for k, (axes, name) in enumerate(zip(row, found.domains, strict=True)):
            for compute, label in enumerate(("equal tokens", "equal compute")):
                of = found.arms(bool(compute))
                losses = [found.measures(arm, bool(compute))[:, k] for arm in of]
                axes.errorbar(
                    [each.mean() for each in losses], [arms.index(arm) - 0.2 + 0.4 * compute for arm in of],
                    xerr=[each.std(ddof=1) if len(each) > 1 else 0.0 for each in losses], linestyle="none",
                    marker="oD"[compute], markersize=4, color=LIGHT[series(compute)], label=label,
                )  # fmt: skip
            target = statistics.fmean(each[1, k] for each in found.yardstick.values())
            axes.axvline(target, color=LIGHT["bad"], linewidth=1.2, linestyle=(0, (4, 2)), label="predicted target")
            axes.set_yticks(range(len(arms)), [plain(arm) for arm in arms] if k == 0 else [])
            axes.invert_yaxis()
            axes.set_title(f"{name}, nats per byte", fontsize=9)
        below.legend(*row[0].get_legend_handles_labels(), loc="outside lower right", ncols=3)
        save(figure, path)


def plain(arm: str) -> str:
    return SHOWN[arm].replace("`", "")
