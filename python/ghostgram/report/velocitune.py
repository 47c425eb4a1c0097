"""Figures of a mixture whose weights move: the weights, and what they come from and lead to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .canvas import canvas, save
from .palette import LIGHT, series

Floats = NDArray[np.float64]


class Course(Protocol):
    """What is drawn: a log as `ghostgram.algorithms.velocitune.reading.read` gives it."""

    @property
    def domains(self) -> tuple[str, ...]:
        """K names."""

    @property
    def tokens(self) -> Floats:
        """(U,) at every update."""

    @property
    def weights(self) -> Floats:
        """(U + 1, K) from w_0 on."""

    def __getitem__(self, column: str) -> Floats:
        """(U, K)."""


def weights(figure: Figure, course: Course) -> None:
    """Weights in force over tokens, stacked to 1; dashed, the mean over tokens so far."""
    tokens = np.concatenate([[0.0], course.tokens])
    axes = figure.subplots()
    stacked = np.cumsum(course.weights, axis=1)
    for k, name in enumerate(course.domains):
        below = stacked[:, k - 1] if k else np.zeros(len(tokens))
        colour = LIGHT[series(k)]
        axes.fill_between(tokens, below, stacked[:, k], color=colour, alpha=0.75, linewidth=0, label=name, step="post")
    for bound in np.cumsum(course["w_mean"], axis=1)[:, :-1].T:
        axes.plot(course.tokens, bound, color=LIGHT["card"], linewidth=1.2, linestyle=(0, (4, 2)))
    axes.set(title="Weights (dashed: the mean so far)", ylim=(0, 1), xlabel="tokens", ylabel="share of tokens")
    axes.set_xlim(0, tokens[-1])
    axes.grid(visible=False)
    _named(axes)


def velocities(figure: Figure, course: Course) -> None:
    """V of every domain: 1 where nothing is learned yet, 0 at the target; faint, as measured."""
    axes = figure.subplots()
    axes.axhline(0, color=LIGHT["muted"], linewidth=0.8)
    for k, name in enumerate(course.domains):
        colour = LIGHT[series(k)]
        axes.plot(course.tokens, course["V_raw"][:, k], color=colour, alpha=0.35, linewidth=1.2)
        axes.plot(course.tokens, course["V"][:, k], color=colour, label=name)
    axes.set(title="What remains of the way to the target", xlabel="tokens", ylabel="V")
    _named(axes)


def losses(figure: Figure, course: Course) -> None:
    """Held-out losses with their 90 % intervals, and each domain's target with its own: a panel for each domain."""
    rows, columns = _panels(course)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for k, (axes, name) in enumerate(zip(grid, course.domains, strict=False)):
        colour, loss, reach = LIGHT[series(k)], course["loss"][:, k], 1.645 * course["se"][:, k]
        axes.fill_between(course.tokens, loss - reach, loss + reach, color=colour, alpha=0.2, linewidth=0)
        axes.plot(course.tokens, loss, color=colour)
        target, low, high = (course[column][-1, k] for column in ("target", "target_low", "target_high"))
        if np.isfinite(target):
            axes.axhline(target, color=LIGHT["muted"], linestyle=(0, (4, 2)), linewidth=1.2)
        if np.isfinite([low, high]).all():
            axes.axhspan(low, high, color=LIGHT["muted"], alpha=0.15, linewidth=0)
        axes.set(title=name, xlabel="tokens")
    for axes in grid[len(course.domains) :]:
        axes.set_visible(False)
    grid[0].set_ylabel("nats per token")


def epochs(figure: Figure, course: Course) -> None:
    """How often each domain has been read."""
    _lines(figure, course, course["epochs"], "How often each domain has been read", "epochs")


def realised(figure: Figure, course: Course) -> None:
    """Samples drawn of each domain less those that weights asked for."""
    draws = course["draws"]
    off = draws - course["requested"] * draws.sum(1, keepdims=True)
    _lines(figure, course, off, "Drawn less asked for", "samples")


class Drawing(NamedTuple):
    """One of the figures."""

    draw: Callable[[Figure, Course], None]
    size: Callable[[Course], tuple[float, float]]
    """Inches."""

    @property
    def says(self) -> str:
        """In words, for those who do not see it."""
        return (self.draw.__doc__ or "").partition("\n")[0]


FIGURES = {
    "weights": Drawing(weights, lambda _: (9.6, 3.9)),
    "velocities": Drawing(velocities, lambda _: (9.6, 3.6)),
    "losses": Drawing(losses, lambda course: (2.6 * _panels(course)[1] + 0.6, 2.7 * _panels(course)[0] + 0.3)),
    "epochs": Drawing(epochs, lambda _: (9.6, 3.4)),
    "realised": Drawing(realised, lambda _: (9.6, 3.4)),
}
"""By the name of their files."""


def fits(path: Path, laws: Sequence[Any], tokens: float) -> None:
    """Measured losses of shorter runs, and the target that a law makes of them: a panel for each domain.

    Args:
        path: Of the figure.
        laws: (name, target) of each domain, as `Targets.by_domain` has them.
        tokens: That targets are for.
    """
    with canvas(2.8 * len(laws) + 0.6, 3.0) as figure:
        row = figure.subplots(1, len(laws), squeeze=False)[0]
        for k, (axes, (name, one)) in enumerate(zip(row, laws, strict=True)):
            n, loss, se = np.array([point[:3] for point in one.points], np.float64).reshape(-1, 3).T
            colour = LIGHT[series(k)]
            axes.errorbar(n, loss, 1.645 * se, fmt="o", color=colour, markersize=4, linewidth=1.2)
            axes.axhline(one.l_init, color=LIGHT["muted"], linewidth=0.8)
            known = np.isfinite([one.low, one.high]).all()
            reach = [[one.target - one.low], [one.high - one.target]] if known else None
            axes.errorbar([tokens], [one.target], reach, fmt="D", color=LIGHT["ink"], markersize=5, linewidth=1.2)
            axes.set(title=f"{name} ({one.form})", xscale="log", xlabel="tokens")
        row[0].set_ylabel("nats per token")
        save(figure, path)


def _panels(course: Course) -> tuple[int, int]:
    """Rows and columns of a grid with a panel for each domain."""
    columns = min(len(course.domains), 4)
    return -(-len(course.domains) // columns), columns


def _lines(figure: Figure, course: Course, values: Floats, title: str, unit: str) -> None:
    axes = figure.subplots()
    for k, name in enumerate(course.domains):
        axes.plot(course.tokens, values[:, k], color=LIGHT[series(k)], label=name)
    axes.set(title=title, xlabel="tokens", ylabel=unit)
    _named(axes)


def _named(axes: Axes) -> None:
    """The domains, above the axes and right of their title."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=6, handlelength=1.2, columnspacing=1.2)
