"""The figures of a log of values: how they are spread, when they were earned, by which sources, and if they add up."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from numpy.typing import NDArray

from .canvas import MILLI, canvas, save
from .palette import LIGHT, series

SOURCES_SHOWN = 8

Floats = NDArray[np.float64]


def spread(path: Path, samples: pa.Table, sets: Sequence[str]) -> None:
    """Distribution of the samples' values, and how much of all |value| the largest of them hold.

    Args:
        path: The .svg or .png to write.
        samples: The table of values, a row per sample with value_<set>.
        sets: The validation sets.
    """
    with canvas(9.6, 3.8) as figure:
        left, right = figure.subplots(1, 2)
        left.axvline(0, color=LIGHT["muted"], linewidth=0.8)
        right.plot([0, 100], [0, 100], color=LIGHT["line"], linewidth=1.2)
        finite = {name: value[np.isfinite(value)] for name in sets for value in [_floats(samples, f"value_{name}")]}
        # A few extreme samples would flatten the rest.
        ends = [np.percentile(MILLI * value, (0.5, 99.5)) for value in finite.values() if len(value)]
        low, high = min(e[0] for e in ends), max(e[1] for e in ends)
        bins = np.linspace(low, max(high, low + 1e-12), 48)
        for index, (name, value) in enumerate(finite.items()):
            colour = LIGHT[series(index)]
            count, _ = np.histogram(np.clip(MILLI * value, low, high), bins)
            left.stairs(100 * count / max(1, len(value)), bins, fill=True, color=colour, alpha=0.2)
            left.stairs(100 * count / max(1, len(value)), bins, color=colour, linewidth=1.6, label=name)
            size = np.sort(np.abs(value))[::-1]
            held = np.concatenate([[0.0], np.cumsum(size)]) / max(size.sum(), np.finfo(float).tiny)
            at = np.linspace(0, len(size), min(len(size), 400) + 1).astype(int)
            right.plot(100 * at / max(1, len(size)), 100 * held[at], color=colour, label=name)
        left.set(title="Value of a sample", xlabel="millinats; outer bins hold the tails", ylabel="% of the samples")
        right.set(title="Concentration", xlabel="% of the samples, largest |value| first", ylabel="% of all |value|")
        right.set(xlim=(0, 100), ylim=(0, 100.5))
        right.legend(loc="lower right", handlelength=1.2)
        save(figure, path)


def over_time(path: Path, table: pa.Table, sets: Sequence[str]) -> None:
    """Quantile bands of the values of single samples, stretch by stretch, and the share of them below 0.

    Args:
        path: The .svg or .png to write.
        table: set, first_step, last_step, negative, q05, q25, q50, q75, q95.
        sets: The validation sets.
    """
    with canvas(9.6, 4.6) as figure:
        grid = figure.subplots(2, len(sets), sharex=True, squeeze=False, height_ratios=(3, 1))
        for index, ((above, below), name) in enumerate(zip(grid.T, sets, strict=True)):
            mine, colour = _of(table, name), LIGHT[series(index)]
            step = _middle(mine)
            above.axhline(0, color=LIGHT["muted"], linewidth=0.8)
            for low, high, alpha in (("q05", "q95", 0.15), ("q25", "q75", 0.3)):
                label = f"{low[1:]} to {high[1:]} %".replace("05", "5")
                above.fill_between(step, MILLI * _floats(mine, low), MILLI * _floats(mine, high), color=colour,
                                   alpha=alpha, linewidth=0, label=label)  # fmt: skip
            above.plot(step, MILLI * _floats(mine, "q50"), color=colour, label="median")
            below.axhline(50, color=LIGHT["muted"], linewidth=0.8)
            below.plot(step, 100 * _floats(mine, "negative"), color=LIGHT["bad"])
            above.set(title=f"Judged by {name}", xlim=(0, None))
            above.legend(loc="best", handlelength=1.2)
            below.set(xlabel="step", ylim=(0, 100))
        grid[0, 0].set_ylabel("value in one step (millinats)")
        grid[1, 0].set_ylabel("% below 0")
        save(figure, path)


def sources(path: Path, table: pa.Table, growth: pa.Table, sets: Sequence[str]) -> None:
    """Value of every source: its mean per sample, and the sum as it grew over the run.

    Args:
        path: The .svg or .png to write.
        table: One row per source: source, samples, mean_value_<set>; the first `SOURCES_SHOWN` are drawn.
        growth: set, source, first_step, last_step, value.
        sets: The validation sets.
    """
    names = table["source"].to_pylist()[:SOURCES_SHOWN]
    with canvas(9.6, 3.4 * len(sets)) as figure:
        grid = figure.subplots(len(sets), 2, squeeze=False, width_ratios=(2, 3))
        for (left, right), name in zip(grid, sets, strict=True):
            mean = MILLI * _floats(table, f"mean_value_{name}")[: len(names)]
            left.barh(names, mean, color=[LIGHT[series(i)] for i in range(len(names))], height=0.65)
            left.invert_yaxis()
            left.axvline(0, color=LIGHT["muted"], linewidth=0.8)
            left.grid(axis="y", visible=False)
            left.set(title=f"Judged by {name}", xlabel="mean value of a sample (millinats)")
            mine = _of(growth, name)
            for index, source in enumerate(names):
                part = mine.filter(pc.equal(mine["source"], source))
                right.plot(_floats(part, "last_step") + 1, np.cumsum(_floats(part, "value")),
                           color=LIGHT[series(index)], label=source)  # fmt: skip
            right.axhline(0, color=LIGHT["muted"], linewidth=0.8)
            right.set(title="Accumulated over the run", xlabel="step", ylabel="value (nats)", xlim=(0, None))
        save(figure, path)


def ledger(path: Path, table: pa.Table, sets: Sequence[str]) -> None:
    """Predicted against measured change of every validation loss: accumulated, and stretch by stretch.

    Args:
        path: The .svg or .png to write.
        table: set, last_step, measurements, measured, predicted, residual.
        sets: The validation sets.
    """
    with canvas(9.6, 3.6 * len(sets)) as figure:
        grid = figure.subplots(len(sets), 2, squeeze=False, width_ratios=(3, 2))
        for (left, right), name in zip(grid, sets, strict=True):
            mine = _of(table, name)
            step, residual = _floats(mine, "last_step") + 1, _floats(mine, "residual")
            measured, predicted = _floats(mine, "measured"), _floats(mine, "predicted")
            left.plot(step, np.cumsum(measured), color=LIGHT["ink"], label="measured")
            left.plot(step, np.cumsum(predicted), color=LIGHT["series-1"], linestyle=(0, (4, 2)), label="predicted")
            left.fill_between(step, np.cumsum(residual), color=LIGHT["bad"], alpha=0.2, linewidth=0, label="residual")
            left.axhline(0, color=LIGHT["muted"], linewidth=0.8)
            left.set(title=f"Loss on {name}, accumulated change", xlabel="step", ylabel="nats", xlim=(0, None))
            left.legend(loc="best", handlelength=1.4)
            known = _floats(mine, "measurements") > 0
            # A measurement may span several steps, and so be of more than its own stretch's prediction.
            _identity(right, measured[known], (measured - residual)[known])
            right.set(title="Stretch by stretch", xlabel="measured change (nats)", ylabel="predicted change (nats)")
        save(figure, path)


def _identity(axes: Axes, measured: Floats, predicted: Floats) -> None:
    """A cloud of points beside the diagonal that they would lie on if every prediction came true."""
    if not len(measured):
        return
    ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
    axes.plot(ends, ends, color=LIGHT["line"], linewidth=1.2)
    axes.scatter(measured, predicted, s=14, color=LIGHT["series-1"], alpha=0.6, linewidths=0)


def _of(table: pa.Table, name: str) -> pa.Table:
    return table.filter(pc.equal(table["set"], name))


def _middle(table: pa.Table) -> Floats:
    return (_floats(table, "first_step") + _floats(table, "last_step")) / 2


def _floats(table: pa.Table, column: str) -> Floats:
    return np.asarray(table[column].to_numpy(), np.float64)
