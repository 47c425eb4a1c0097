"""Which images the experts see in which epoch: the easy ones first, all of them later, at last without the easiest."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram.algorithms.pad.scores import Scores

I64 = NDArray[np.int64]

Ratio = float | str | Fraction
"""A share, taken as it is written: .1 and ".1" are a tenth, not the float nearest to it."""

PRESETS: dict[str, tuple[str, int, tuple[tuple[int, str], ...]]] = {
    "pad-cifar10": (".75", 20, ((40, ".1"), (60, ".2"))),
    "pad-cifar100": (".75", 40, ((60, ".1"), (80, ".2"))),
    "pad-tiny": (".75", 40, ((60, ".1"), (80, ".2"))),
    "none": ("1", 0, ()),
}
"""init_ratio, add_end and removals by name. Published is the first one alone, in full; of the next two PAD names
add_end, and their removals are those of the first, as late after add_end. The last is that of DATM, FTD and MTT."""


class DifficultySchedule:
    """The difficulty schedule of PAD, for classes of any sizes.

    Of a class of n images, easiest first, epoch e = 0, 1, ... has

        e <= add_end               the easiest floor(p n),  p = min(1, curve of init_ratio and e / add_end)
        add_end < e <= e_1         all
        e_j < e                    all but the easiest floor(r_j n), j the last removal with e_j < e

    so a removal is a step, and ratios do not add up. With a = init_ratio and x = e / add_end (1 if add_end is 0) the
    curves are linear a + (1 - a) x, root sqrt(a^2 + (1 - a^2) x) and geometric a^(1 - x), each from a to 1.

    Numbers of images are exact: floats would lose one for some (a = .5, n = 6000, e = 3 of 20: 3449, not 3450).

    Args:
        scores: The images' scores and classes.
        init_ratio: a, above 0 and at most 1.
        add_end: The epoch from which on all are in, at least 0.
        removals: (e_j, r_j), epochs from add_end on and rising, 0 <= r_j <= 1.
        curve: "linear" as in PAD, "root" or "geometric".
        exact: False gives the numbers of float arithmetic, as the method's release has them.

    Raises:
        ValueError: An argument is out of its range, or in some epoch a class has no image left; the message names both.

    Source:
        PAD (arXiv 2408.03360, section 3.1), whose text describes one removal and whose command makes two; the bounds
        are <= as there. The geometric curve of the release does not run from a to 1, and is not offered.
    """

    def __init__(
        self,
        scores: Scores,
        init_ratio: Ratio,
        add_end: int,
        removals: Sequence[tuple[int, Ratio]] = (),
        *,
        curve: str = "linear",
        exact: bool = True,
    ) -> None:
        number: Callable[[Ratio], Any] = _written if exact else float
        self._start, self._add_end, self._exact = number(init_ratio), add_end, exact
        self._removals = [(epoch, number(ratio)) for epoch, ratio in removals]
        self._curve = curve
        if curve not in _CURVES:
            raise ValueError(f"curve: expected one of {', '.join(_CURVES)}, got {curve!r}")
        if not 0 < self._start <= 1:
            raise ValueError(f"init_ratio: expected above 0 and at most 1, got {init_ratio}")
        if add_end < 0:
            raise ValueError(f"add_end: expected at least 0, got {add_end}")
        epochs = [add_end - 1, *(epoch for epoch, _ in removals)]
        if any(after <= before for before, after in pairwise(epochs)):
            raise ValueError(f"removals: expected rising epochs from add_end {add_end} on, got {epochs[1:]}")
        if not all(0 <= ratio <= 1 for _, ratio in self._removals):
            raise ValueError(f"removals: expected ratios from 0 to 1, got {[ratio for _, ratio in removals]}")
        self._orders = [scores.order(c) for c in range(scores.classes)]
        self._sizes = np.array([len(order) for order in self._orders])
        for epoch in (0, *(epoch + 1 for epoch, _ in self._removals)):
            if not (kept := self.kept(epoch)).all():
                c = int(kept.argmin())
                raise ValueError(f"schedule: class {c} has none of its {self._sizes[c]} images left in epoch {epoch}")

    @classmethod
    def preset(cls, name: str, scores: Scores) -> DifficultySchedule:
        """One of `PRESETS`.

        Raises:
            ValueError: There is none of this name, or as in the class.
        """
        if name not in PRESETS:
            raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(scores, *PRESETS[name])

    def kept(self, epoch: int) -> I64:
        """(C,) how many images of each class the epoch has."""
        first, last = self._bounds(epoch)
        return last - first

    def share(self, epoch: int) -> float:
        """The part of all images that the epoch has."""
        return float(self.kept(epoch).sum() / self._sizes.sum())

    def indices(self, epoch: int) -> I64:
        """The images that the epoch has, by index, ascending."""
        bounds = zip(self._orders, *self._bounds(epoch), strict=True)
        return np.sort(np.concatenate([order[first:last] for order, first, last in bounds]))

    @property
    def digest(self) -> str:
        """BLAKE2b-128, as 32 hexadecimal digits, of the settings and the order of every class."""
        settings = self._start, self._add_end, self._removals, self._curve, self._exact, self._sizes.tolist()
        running = hashlib.blake2b(repr(settings).encode(), digest_size=16)
        for order in self._orders:
            running.update(np.ascontiguousarray(order, "<i8").data)
        return running.hexdigest()

    def plot(self, axes: Any, epochs: int) -> None:
        """Draws the share of images that each of so many epochs has on axes of matplotlib."""
        axes.step(range(epochs), [self.share(epoch) for epoch in range(epochs)], where="mid")
        axes.set(xlabel="epoch", ylabel="share of images", ylim=(0, 1.05))

    def _bounds(self, epoch: int) -> tuple[I64, I64]:
        """From where to where of each class' order the epoch has the images."""
        if epoch < 0:
            raise ValueError(f"epoch: expected at least 0, got {epoch}")
        if epoch < self._add_end:
            return np.zeros_like(self._sizes), self._of_sizes(lambda n: self._added(epoch, n))
        ratio = next((ratio for after, ratio in reversed(self._removals) if after < epoch), 0)
        return self._of_sizes(lambda n: math.floor(ratio * n)), self._sizes

    def _of_sizes(self, count: Callable[[int], int]) -> I64:
        """(C,) a count for each class that its size decides."""
        counts = {n: count(n) for n in set(self._sizes.tolist())}
        return np.array([counts[n] for n in self._sizes.tolist()])

    def _added(self, epoch: int, n: int) -> int:
        """floor(p n)."""
        base, root = _CURVES[self._curve](self._start, epoch, self._add_end)
        if not self._exact:
            return math.floor(float(base ** (1 / root)) * n)
        return bisect_right(range(n + 1), base, key=lambda k: Fraction(k, n) ** root) - 1


def _written(ratio: Ratio) -> Fraction:
    return Fraction(str(ratio))


_CURVES: dict[str, Callable[[Any, int, int], tuple[Any, int]]] = {
    "linear": lambda a, e, end: (a + (1 - a) * e / end, 1),
    "root": lambda a, e, end: (a**2 + (1 - a**2) * e / end, 2),
    "geometric": lambda a, e, end: (a ** (end - e), end),
}
"""(base, root) with p = base^(1/root): whether k/n <= p is then a comparison of rationals."""
