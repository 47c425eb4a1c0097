"""Figures of MATES: arms of an experiment, what stages chose, and how far predictions are from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .canvas import canvas, save
from .palette import LIGHT, series


def arms(path: Path, found: Mapping[int, Mapping[str, Any]], tests: Sequence[str] = ("novels", "pool")) -> None:
    """Losses over steps, the mean over seeds with its range: one panel for each test.

    Args:
        path: Of the figure.
        found: seed -> arm -> step and the losses of every test, lists of one length.
        tests: Their names.
    """
    with canvas(9.6, 3.9) as figure:
        row = figure.subplots(1, len(tests), squeeze=False)[0]
        for axes, test in zip(row, tests, strict=True):
            for index, arm in enumerate(next(iter(found.values()))):
                runs = [each[arm] for each in found.values()]
                length = min(len(run["step"]) for run in runs)
                losses = np.array([run[test][:length] for run in runs])
                steps, colour = runs[0]["step"][:length], LIGHT[series(index)]
                axes.plot(steps, losses.mean(0), color=colour, label=arm)
                axes.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.set(title=f"Loss on {test}", xlabel="step")
        row[0].set_ylabel("nats per byte")
        handles, labels = row[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), handlelength=1.4)
        save(figure, path)


def domains(path: Path, stages: Sequence[Mapping[str, Any]]) -> None:
    """Documents that each stage chose, by domain."""
    names = sorted({name for stage in stages for name in stage["domains"]})
    with canvas(9.6, 3.6) as figure:
        axes = figure.subplots()
        wide = 0.8 / len(stages)
        for index, stage in enumerate(stages):
            counts = [stage["domains"].get(name, 0) for name in names]
            places = np.arange(len(names)) + (index - (len(stages) - 1) / 2) * wide
            axes.bar(places, counts, wide * 0.92, color=LIGHT[series(index)], label=f"stage {stage['stage']}")
        axes.set_xticks(np.arange(len(names)), names, rotation=20, ha="right")
        axes.set(title="What was chosen", ylabel="documents")
        axes.grid(axis="x", visible=False)
        axes.legend()
        save(figure, path)


def predicted(path: Path, predictions: ArrayLike, measured: ArrayLike, title: str) -> None:
    """Predicted against measured influence of documents, in millinats per reference token."""
    x, y = 1e3 * np.asarray(predictions), 1e3 * np.asarray(measured)
    with canvas(4.8, 4.4) as figure:
        axes = figure.subplots()
        axes.axline((float(x.mean()), float(x.mean())), slope=1, color=LIGHT["muted"], linewidth=0.8)
        axes.scatter(x, y, s=9, color=LIGHT["series-1"], alpha=0.5, linewidths=0)
        axes.set(title=title, xlabel="predicted (millinats per token)", ylabel="measured")
        save(figure, path)


def learning(path: Path, labels: ArrayLike, spearmans: ArrayLike, lows: ArrayLike, highs: ArrayLike, law: Any) -> None:
    """A learning curve: held-out Spearman against labels, with the law fitted to it."""
    n, rho = np.asarray(labels, float), np.asarray(spearmans, float)
    with canvas(4.8, 3.8) as figure:
        axes = figure.subplots()
        between = np.geomspace(n.min(), 4 * n.max(), 100)
        axes.plot(between, [law(each) for each in between], color=LIGHT["muted"], linestyle=(0, (4, 2)))
        reach = np.abs(np.stack([rho - np.asarray(lows), np.asarray(highs) - rho]))
        axes.errorbar(n, rho, reach, fmt="o", color=LIGHT["series-1"], markersize=4, linewidth=1.2)
        axes.set(xscale="log", title="Is more labelling worth it?", xlabel="labels", ylabel="held-out Spearman")
        save(figure, path)


def drift(path: Path, checks: Sequence[tuple[int, Mapping[str, float]]]) -> None:
    """Spearman of the influence model in use with exact labels of later models, by reference."""
    with canvas(4.8, 3.6) as figure:
        axes = figure.subplots()
        for index, name in enumerate(sorted({name for _, each in checks for name in each})):
            points = [(step, each[name]) for step, each in checks if name in each]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=LIGHT[series(index)], label=name)
        axes.set(title="Does the influence model still hold?", xlabel="step", ylabel="Spearman")
        axes.legend()
        save(figure, path)
