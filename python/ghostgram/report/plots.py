"""The report's figures, as SVG that takes its colours and fonts from the page around it."""

import numpy as np
from numpy.typing import NDArray

from .canvas import MILLI, canvas, svg
from .palette import LIGHT, series
from .summary import CORRUPTED, Summary


def growth(summary: Summary) -> str:
    """Mean value per document, accumulated over the run, by domain: one panel per validation set."""
    with canvas(9.6, 3.6) as figure:
        row = figure.subplots(1, len(summary.sets), squeeze=False)[0]
        for axes, name in zip(row, summary.sets, strict=True):
            axes.axhline(0, color=LIGHT["muted"], linewidth=0.8)
            for index, (group, total) in enumerate(summary.growth[name].items()):
                bad = group == CORRUPTED
                colour, dash = (LIGHT["bad"], (0, (4, 2))) if bad else (LIGHT[series(index)], "solid")
                axes.plot(np.arange(1, len(total) + 1), MILLI * total, color=colour, linestyle=dash, label=group)
            axes.set(title=f"Judged by {name}", xlabel="step", xlim=(0, None))
        row[0].set_ylabel("value per document (millinats)")
        handles, labels = row[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), handlelength=1.4, columnspacing=1.4)
        return svg(figure, "growth")


def ledger(summary: Summary) -> str:
    """Predicted and measured change of each validation loss, accumulated, with their difference below."""
    with canvas(9.6, 4.4) as figure:
        grid = figure.subplots(2, len(summary.sets), sharex=True, squeeze=False, height_ratios=(3, 1))
        for (above, below), name in zip(grid.T, summary.sets, strict=True):
            entries = summary.ledger[name]
            predicted, measured = np.cumsum(entries.predicted), np.cumsum(entries.measured)
            above.plot(entries.step + 1, measured, color=LIGHT["ink"], label="measured")
            above.plot(entries.step + 1, predicted, color=LIGHT["series-1"], linestyle=(0, (4, 2)), label="predicted")
            below.axhline(0, color=LIGHT["muted"], linewidth=0.8)
            below.plot(entries.step + 1, measured - predicted, color=LIGHT["bad"], label="residual")
            below.fill_between(entries.step + 1, measured - predicted, color=LIGHT["bad"], alpha=0.15, linewidth=0)
            above.set(title=f"Loss on {name}", xlim=(0, None))
            below.set(xlabel="step")
        grid[0, 0].set_ylabel("change (nats)")
        grid[1, 0].set_ylabel("residual")
        pairs = [axes.get_legend_handles_labels() for axes in grid[:, 0]]
        figure.legend(
            [handle for handles, _ in pairs for handle in handles],
            [label for _, labels in pairs for label in labels],
            loc="outside upper left",
            ncols=3,
            handlelength=1.4,
        )
        return svg(figure, "ledger")


def detection(summary: Summary) -> str:
    """ROC of finding corrupted documents by a low value: by the mean over the sets, and by each set alone."""
    with canvas(4.6, 4.2) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=LIGHT["line"], linewidth=1.2)
        for index, (name, curve) in enumerate(summary.detection_by_set.items()):
            label = f"{name} alone  {curve.auroc:.3f}"
            axes.plot(curve.fpr, curve.tpr, color=LIGHT[series(index)], linewidth=1.2, label=label)
        curve = summary.detection
        axes.plot(curve.fpr, curve.tpr, color=LIGHT["bad"], linewidth=2.4, label=f"mean over sets  {curve.auroc:.3f}")
        axes.fill_between(curve.fpr, curve.tpr, color=LIGHT["bad"], alpha=0.08, linewidth=0)
        axes.set(xlabel="clean documents flagged", ylabel="corrupted documents found", xlim=(0, 1), ylim=(0, 1.005))
        axes.set_aspect("equal")
        axes.legend(loc="lower right", handlelength=1.2, title="AUROC", alignment="left")
        return svg(figure, "detection")


def histogram(summary: Summary, corrupted: NDArray[np.bool_]) -> str:
    """Distribution of the documents' mean values, clean against corrupted, each adding up to 100 %."""
    with canvas(4.6, 4.2) as figure:
        axes = figure.subplots()
        value = MILLI * summary.mean_value
        low, high = np.percentile(value, (0.5, 99.5))  # a few extreme documents would flatten the rest
        bins = np.linspace(low, high, 48)
        for label, mine, colour in (("clean", ~corrupted, "series-1"), ("corrupted", corrupted, "bad")):
            count, _ = np.histogram(np.clip(value[mine], low, high), bins)
            axes.stairs(100 * count / mine.sum(), bins, fill=True, color=LIGHT[colour], alpha=0.25)
            axes.stairs(100 * count / mine.sum(), bins, color=LIGHT[colour], linewidth=1.6, label=label)
        axes.axvline(0, color=LIGHT["muted"], linewidth=0.8)
        axes.set(xlabel="value (millinats; outer bins hold the tails)", ylabel="% of its kind", xlim=(low, high))
        axes.legend(loc="upper right", handlelength=1.2)
        return svg(figure, "histogram")
