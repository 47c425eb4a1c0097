"""The roofline of a machine, and how near to it the ops come."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from .canvas import canvas, save
from .palette import LIGHT, series

COLOURS = 6  # that `series` has
MARKERS = {"cpu": "o", "cuda": "s", "triton": "^"}


class Point(NamedTuple):
    """One op at one shape on one backend."""

    op: str
    shape: str
    backend: str
    intensity: float
    """FLOPs per byte."""
    gflops: float


def roofline(path: Path, points: Sequence[Point], gflops: float, gbytes: float, title: str) -> None:
    """Arithmetic intensity against GFLOP/s, both logarithmic, under the roofs; points are numbered, and named beside.

    Args:
        path: The .png or .svg to write.
        points: What was measured, from cold caches: warm ones are under no roof of memory.
        gflops: The roof of multiply-adds.
        gbytes: The roof of memory, GB/s.
        title: Says which machine.
    """
    with canvas(14, max(5.2, 0.24 * len(points) + 1.2)) as figure:
        axes, names = figure.subplots(1, 2, width_ratios=(1.3, 1))
        ridge = gflops / gbytes
        low, high = min(p.intensity for p in points), max(p.intensity for p in points)
        xs = np.geomspace(min(low, ridge) / 2.5, max(high, ridge) * 2.5, 200)
        roof = np.minimum(gflops, gbytes * xs)
        axes.plot(xs, roof, color=LIGHT["ink"])
        axes.axvline(ridge, color=LIGHT["line"], linewidth=1.2, linestyle=":")
        bottom = min(min(p.gflops for p in points), gbytes * xs[0]) / 2
        axes.set(
            xscale="log",
            yscale="log",
            xlim=(xs[0], xs[-1]),
            ylim=(bottom, 2.2 * max(gflops, *(p.gflops for p in points))),
        )
        axes.set(title=title, xlabel="FLOPs per byte", ylabel="GFLOP/s")
        axes.text(xs[-1], gflops * 1.08, f"{gflops:.0f} GFLOP/s", ha="right", va="bottom", color=LIGHT["muted"])
        # Above the roofs there is nothing else to read.
        axes.text(xs[0] * 1.15, gflops * 1.08, f"slope: {gbytes:.0f} GB/s", va="bottom", color=LIGHT["muted"])
        colours = {op: LIGHT[series(i)] for i, op in enumerate(dict.fromkeys(p.op for p in points))}
        hollow = list(colours)[COLOURS:]
        for p in points:
            axes.plot(p.intensity, p.gflops, **_marker(p, colours, hollow), markersize=7)
        figure.draw_without_rendering()  # only then are the axes where they will be
        _number(axes, points, colours, np.column_stack([xs, roof]))
        _list(names, points, colours, hollow)
        save(figure, path)


def _marker(p: Point, colours: dict[str, str], hollow: Sequence[str]) -> dict[str, Any]:
    """A backend's shape in an op's colour; hollow where the colours have begun again."""
    face = LIGHT["card"] if p.op in hollow else colours[p.op]
    return {"marker": MARKERS[p.backend], "color": colours[p.op], "markerfacecolor": face, "markeredgewidth": 1.6}


def _number(axes: Axes, points: Sequence[Point], colours: dict[str, str], roof: NDArray[np.float64]) -> None:
    """Writes each point's number near it, where there is room between other numbers, other points and the roof."""
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    places = [np.array([1.1 * far * np.cos(at), far * np.sin(at)]) for far in (11, 16, 22) for at in angles]
    inches = 72 / axes.figure.dpi
    marked = [(p.intensity, p.gflops) for p in points]
    taken = list(axes.transData.transform([*marked, *roof]) * inches)
    for number, p in enumerate(points, 1):
        at = taken[number - 1]
        others = [other for other in taken if other is not at]
        room = [min(13, *(np.hypot(*(at + place - other)) for other in others)) for place in places]
        offset = places[int(np.argmax([x - 0.1 * np.hypot(*place) for x, place in zip(room, places, strict=True)]))]
        axes.annotate(
            str(number), (p.intensity, p.gflops), xytext=tuple(offset), textcoords="offset points",
            ha="center", va="center", fontsize=8.5, color=colours[p.op],
        )  # fmt: skip
        taken.append(at + offset)


def _list(axes: Axes, points: Sequence[Point], colours: dict[str, str], hollow: Sequence[str]) -> None:
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(len(points) + 0.5, 0.5))
    axes.set_title("GFLOP/s", loc="right", fontsize=8.5, weight="normal", color=LIGHT["muted"])
    for number, p in enumerate(points, 1):
        axes.text(0.04, number, str(number), ha="right", va="center", fontsize=8.5, color=colours[p.op])
        axes.plot(0.08, number, **_marker(p, colours, hollow), markersize=6, clip_on=False)
        axes.text(0.12, number, f"{p.op}, {p.backend}", va="center", fontsize=8.5, weight="bold")
        axes.text(0.43, number, p.shape, va="center", fontsize=7, color=LIGHT["muted"])
        axes.text(1.0, number, f"{p.gflops:.3g}", ha="right", va="center", fontsize=8.5)
