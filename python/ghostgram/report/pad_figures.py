"""Figures of PAD: the images, and how a distillation went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .canvas import canvas, save
from .palette import LIGHT, series

Floats = NDArray[np.floating[Any]]

COLUMNS = 20
"""Images of a class that a grid shows; of more, the first."""
_CELL = 0.42  # inches
_CLIP = 2.5  # standard deviations


def grid(path: Path, pixels: Floats, classes: Sequence[str], title: str, *, signed: bool = False) -> None:
    """Images, a row for each class, under one contrast: mean -+ 2.5 standard deviations of all that is shown.

    Args:
        path: Of the figure.
        pixels: (n, C, H, W), class by class; C is 1 or 3.
        classes: Their names.
        title: Above the grid.
        signed: Whether 0 is the middle of the contrast, as for differences.
    """
    ipc = len(pixels) // len(classes)
    shown = pixels.reshape(len(classes), ipc, *pixels.shape[1:])[:, :COLUMNS]
    middle = 0.0 if signed else float(shown.mean())
    reach = max(_CLIP * float(np.sqrt(np.square(shown - middle).mean())), 1e-12)
    scaled = np.clip((shown - middle + reach) / (2 * reach), 0, 1)
    tiled = _tiled(scaled, 0.5 if signed else 1.0)
    wide, high = shown.shape[1], len(classes)
    cell = max(_CELL, min(0.7, 1.6 / wide))
    with canvas(cell * wide + 1.6, cell * high + 0.7) as figure:
        axes = figure.subplots()
        colours = "RdBu_r" if signed else "gray"
        axes.imshow(
            tiled if tiled.shape[2] == 3 else tiled[..., 0], cmap=colours, vmin=0, vmax=1, interpolation="nearest"
        )
        side = tiled.shape[0] / high
        axes.set_yticks([side * (row + 0.5) - 0.5 for row in range(high)], list(classes))
        axes.set_xticks([])
        axes.grid(False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(title + (f" (the first {COLUMNS} of {ipc})" if ipc > COLUMNS else ""))
        save(figure, path)


def _tiled(images: Floats, white: float) -> Floats:
    """(rows, columns, C, H, W) in [0, 1] as one image (height, width, C), with white lines between."""
    rows, columns, channels, height, width = images.shape
    line = max(1, height // 14)
    sheet = np.full((rows * (height + line), columns * (width + line), channels), white)
    for r in range(rows):
        for c in range(columns):
            top, left = r * (height + line), c * (width + line)
            sheet[top : top + height, left : left + width] = images[r, c].transpose(1, 2, 0)
    return sheet[: sheet.shape[0] - line, : sheet.shape[1] - line]


def curves(figure: Figure, curve: Mapping[str, NDArray[Any]], experts: Mapping[str, Any]) -> None:
    """Loss, what was left out, step size, label entropy, start epochs, displacement, gradients and validation; experts.

    Args:
        figure: To draw into.
        curve: Columns of one length, as `pad.curve` makes them.
        experts: accuracy: of each expert by epoch from 0, None where it was not measured; kept: shares by epoch.
    """
    ((loss, skipped, beta), (entropy, start, moved), (norms, validation, trained)) = figure.subplots(3, 3)
    iteration = curve["iteration"]
    _dots(loss, iteration, curve["loss"], "Matching loss")
    share = 1 - curve["kept"] / curve["matches"]
    skipped.plot(iteration, 100 * np.cumsum(share) / (1 + np.arange(len(share))), color=LIGHT["bad"])
    skipped.set(title="Left out so far", ylabel="% of matches", ylim=(0, max(5, skipped.get_ylim()[1])))
    beta.plot(iteration, curve["beta"], color=LIGHT["series-1"])
    beta.set(title="Step size beta")
    entropy.plot(iteration, curve["entropy"], color=LIGHT["series-3"])
    entropy.set(title="Mean entropy of labels", ylabel="nats")
    start.scatter(iteration, curve["start"], s=3, color=LIGHT["series-1"], alpha=0.35, linewidths=0)
    start.step(iteration, curve["bound"], where="post", color=LIGHT["bad"], linewidth=1.2)
    start.set(title="Start epoch, and its bound")
    moved.plot(iteration, curve["displacement"], color=LIGHT["series-4"])
    moved.set(title="Displacement of images", ylabel="root mean square")
    for index, name in enumerate(("images", "label_logits", "beta")):
        found = curve[f"norm_{name}"]
        if np.isfinite(found).any():
            label = name.replace("label_logits", "labels")
            norms.plot(iteration, found, color=LIGHT[series(index)], linewidth=0.8, label=label)
    norms.set(title="Norms of gradients", yscale="log")
    if norms.lines:
        norms.set_ylim(top=20 * norms.get_ylim()[1])  # room for the legend
        norms.legend(loc="upper left", ncols=3, handlelength=0.8, columnspacing=0.8)
    at = np.isfinite(curve["validation"])
    validation.errorbar(
        iteration[at] + 1, 100 * curve["validation"][at], 100 * curve["validation_std"][at], fmt="o-", markersize=4,
        color=LIGHT["series-2"],
    )  # fmt: skip
    validation.set(title="Validation, std over nets", ylabel="% right")
    for axes in figure.axes:
        axes.set_xlabel("iteration")
    _experts(trained, experts)


def _experts(axes: Axes, found: Mapping[str, Any]) -> None:
    """Accuracy of each expert by epoch and their mean, over the share of data that the schedule gives them."""
    accuracy = 100 * np.array(found["accuracy"], dtype=float)
    epochs = np.flatnonzero(np.isfinite(accuracy).all(0))
    kept = 100 * np.array(found["kept"])
    axes.fill_between(np.arange(len(kept) + 1), [*kept, kept[-1]], step="post", color=LIGHT["series-2"], alpha=0.18,
                      linewidth=0, label="data kept")  # fmt: skip
    axes.plot(epochs, accuracy[:, epochs].T, color=LIGHT["series-1"], alpha=0.3, linewidth=0.9)
    axes.plot(epochs, accuracy[:, epochs].mean(0), color=LIGHT["ink"], label="right, mean")
    axes.set(title="Experts", ylabel="%", xlabel="epoch", ylim=(0, 103))
    axes.legend(loc="lower right", handlelength=1.0)


def _dots(axes: Axes, x: Floats, y: Floats, title: str) -> None:
    """Single values and their mean over fiftieths of the run."""
    axes.scatter(x, y, s=3, color=LIGHT["series-1"], alpha=0.35, linewidths=0)
    window = max(1, len(x) // 50)
    blocks = [slice(at, at + window) for at in range(0, len(x), window)]
    middles = [float(np.nanmean(y[b])) if np.isfinite(y[b]).any() else np.nan for b in blocks]
    axes.plot([float(x[b].mean()) for b in blocks], middles, color=LIGHT["ink"])
    axes.axhline(1, color=LIGHT["muted"], linewidth=0.8, linestyle=(0, (4, 2)))
    axes.set(title=title, ylim=(0, None))
