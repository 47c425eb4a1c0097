"""What `ghostgram velocitune` finds, and how it is drawn."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ghostgram.algorithms.velocitune.reading import Course
from ghostgram.algorithms.velocitune.rules.velocitune import Velocitune
from ghostgram.algorithms.velocitune.simplex import normalised
from ghostgram.algorithms.velocitune.simulate import Toy, simulate
from ghostgram.algorithms.velocitune.targets import Point, Targets


def points_of(runs: Path) -> tuple[dict[str, tuple[float, float]], dict[str, list[Point]]]:
    """The losses before training and the points of a record of proxy runs: tokens -> domain -> (loss, se).

    Raises:
        ValueError: It is no such file, or lacks the losses before training.
    """
    try:
        record = json.loads(runs.read_text(encoding="utf-8"))
        by_tokens = {
            int(n): {name: (float(loss), float(se)) for name, (loss, se) in run.items()} for n, run in record.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{runs}: expected tokens -> domain -> [loss, se], got {error}") from error
    start = by_tokens.pop(0, None)
    if start is None:
        raise ValueError(f'{runs}: expected the losses before training under "0", got runs of {sorted(by_tokens)}')
    for n, run in by_tokens.items():
        if set(run) != set(start):
            raise ValueError(f"{runs}: expected losses of {list(start)} after {n} tokens, got those of {list(run)}")
    return start, {name: [Point(n, *by_tokens[n][name]) for n in sorted(by_tokens)] for name in start}


def draw_targets(made: Targets, console: Console) -> None:
    """One row for each domain."""
    table = Table("domain", "before", "target", "90 % interval", "law", "left-out error", "flags", title="Targets")
    for name, one in made.by_domain.items():
        interval = f"{one.low:.4f} .. {one.high:.4f}" if np.isfinite([one.low, one.high]).all() else "-"
        error = f"{one.left_out_error:+.4f}" if np.isfinite(one.left_out_error) else "-"
        table.add_row(
            name, f"{one.l_init:.4f}", f"{one.target:.4f}", interval, one.form, error, ", ".join(one.flags) or "-"
        )
    console.print(table)


def toys(
    tau: Sequence[float], gap: Sequence[float], prior: Sequence[float], total: float, intervals: Sequence[float],
    presets: Sequence[str], se: float, seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """What every preset does at every interval: last weights, how far they swing, and the losses it ends with."""
    toy = Toy.of(tau, gap if len(gap) > 1 else gap[0])
    first = normalised(prior if len(prior) > 1 else list(prior) * len(tau), "prior")
    found = []
    for preset in presets:
        for interval in intervals:
            rule = Velocitune(toy.targets(), preset, budget=total)
            run = simulate(rule, toy, first, total, interval, se=se, seed=seed)
            found.append(
                {
                    "preset": preset,
                    "interval": interval,
                    "weights": run.weights[-1].tolist(),
                    "swing": run.swing.tolist(),
                    "shares": run.shares.tolist(),
                    "equal_velocity": normalised(toy.tau).tolist(),
                    "losses": run.losses[-1].tolist(),
                }
            )
    return found


def draw_toys(found: Sequence[dict[str, Any]], console: Console) -> None:
    """One row for each preset and interval."""
    table = Table("preset", "interval", "last weights", "swing", "shares of tokens", "losses", title="Toy runs")
    for each in found:
        columns = (_row(each[name]) for name in ("weights", "swing", "shares", "losses"))
        table.add_row(each["preset"], f"{each['interval']:g}", *columns)
    console.print(table)
    console.print(f"Equal velocities need the shares {_row(found[0]['equal_velocity'])}.")


def findings(course: Course) -> dict[str, Any]:
    """The end of a run and how it came there, by domain; numbers that it has not are null."""
    columns = ("w_before", "w_after", "w_mean", "loss", "target", "V", "epochs", "requested", "realised")
    ends = {name: course[name][0 if name == "w_before" else -1] for name in columns}
    by_domain = {}
    for k, name in enumerate(course.domains):
        numbers = {column: float(values[k]) for column, values in ends.items()}
        by_domain[name] = {
            **{column: value if np.isfinite(value) else None for column, value in numbers.items()},
            "guards": _counted(row[k] for row in course.guards),
            "alarms": _counted(row[k] for row in course.alarms),
        }
    last = {name: course[name][-1, 0] for name in ("eval_seconds", "flops")}
    return {
        "rule": course.rule,
        "updates": len(course.step),
        "steps": int(course.step[-1]),
        "tokens": int(course.tokens[-1]),
        "moved": float(np.abs(np.diff(course.weights, axis=0)).sum()),
        **{name: float(value) if np.isfinite(value) else None for name, value in last.items()},
        "domains": by_domain,
    }


def draw_course(found: dict[str, Any], console: Console) -> None:
    """One row for each domain."""
    console.print(found["rule"].splitlines()[0], highlight=False)
    flops = "" if found["flops"] is None else f", {found['flops']:.3g} FLOPs"
    console.print(
        f"{found['updates']} updates in {found['steps']} steps on {found['tokens']:,} tokens{flops}; evaluations took "
        f"{found['eval_seconds']:.1f} s; weights moved by {found['moved']:.3f} in all"
    )
    table = Table("domain", "w_0", "w", "mean w", "loss", "target", "V", "epochs", title="Domains")
    for name, one in found["domains"].items():
        numbers = (one[column] for column in ("w_before", "w_after", "w_mean", "loss", "target", "V", "epochs"))
        table.add_row(name, *("-" if number is None else f"{number:.3f}" for number in numbers))
    console.print(table)
    for kind in ("guards", "alarms"):
        told = {
            name: ", ".join(f"{what} {n}" for what, n in one[kind].items()) for name, one in found["domains"].items()
        }
        for name, text in told.items():
            if text:
                console.print(f"{kind} of {name}, by number of updates: {text}", highlight=False)


def _counted(texts: Any) -> dict[str, int]:
    """How often each name comes in texts of names with commas between them."""
    return dict(Counter(name for text in texts for name in text.split(",") if name))


def _row(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
