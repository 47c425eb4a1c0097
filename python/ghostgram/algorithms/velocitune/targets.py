"""Target losses by domain: what they are, where they came from, and the file that holds them."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ghostgram._files import write_atomically
from ghostgram.algorithms.velocitune.simplex import F64, Bool, check_names

Use = Literal["mean", "lower", "upper"]


class Point(NamedTuple):
    """One measured loss of one domain, of a model trained on so many tokens."""

    tokens: float
    """D, of all domains together."""
    loss: float
    """Nats per token."""
    se: float
    """Its standard error."""
    size: float | None = None
    """N, parameters of the model; for the law of N and D only."""


@dataclass(frozen=True)
class DomainTarget:
    """A domain's target loss (nats per token) and everything that led to it."""

    l_init: float
    target: float
    se_init: float = 0.0
    se_target: float = 0.0
    low: float = float("nan")
    """The lower end of the 90 % interval of the target; nan where there is none."""
    high: float = float("nan")
    form: str = "manual"
    parameters: Mapping[str, float] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    residuals: tuple[float, ...] = ()
    """Measured less fitted loss of each point."""
    left_out_error: float = float("nan")
    """Of predicting the largest D from the others, measured less predicted."""
    flags: tuple[str, ...] = ()
    """What a reader should know: "degenerate", "noisier than se", "reaching", and refusals that were allowed."""


@dataclass(frozen=True)
class Targets:
    """Targets of all domains, in their order.

    Args:
        by_domain: Target by name; the order of the names is that of all vectors.
        tokens: D, the tokens that targets are for; nan if that means nothing.
        proxy: Hash of the measurements, or "".
        use: Which number is passed on: the target, or an end of its interval.

    Raises:
        ValueError: No domain, an unknown `use`, or an interval asked for that a domain has not.
    """

    by_domain: Mapping[str, DomainTarget]
    tokens: float = float("nan")
    proxy: str = ""
    use: Use = "mean"

    def __post_init__(self) -> None:
        check_names(list(self.by_domain), "by_domain")
        if self.use not in ("mean", "lower", "upper"):
            raise ValueError(f'use: expected "mean", "lower" or "upper", got {self.use!r}')
        for name, one in self.by_domain.items():
            if not np.isfinite([one.l_init, one.se_init, one.se_target, self._loss(one)]).all():
                raise ValueError(
                    f"by_domain: expected finite losses and errors of {name!r} for {self.use!r}, got {one}"
                )

    @classmethod
    def given(
        cls,
        domains: Sequence[str],
        l_init: ArrayLike,
        target: ArrayLike,
        *,
        se_init: ArrayLike = 0.0,
        se_target: ArrayLike = 0.0,
        form: Literal["manual", "perfect"] = "manual",
    ) -> Targets:
        """Targets that were not fitted.

        Args:
            domains: Names.
            l_init: (K,) losses before training.
            target: (K,) losses to reach.
            se_init: (K,) standard errors, or one for all.
            se_target: (K,) standard errors, or one for all.
            form: "perfect" for the losses that a full static run did reach.

        Raises:
            ValueError: Not one number for each domain.
        """
        vectors = []
        for name, value in (("l_init", l_init), ("target", target), ("se_init", se_init), ("se_target", se_target)):
            x = np.asarray(value, np.float64)
            if x.shape != (len(domains),) and not (name.startswith("se") and x.ndim == 0):
                raise ValueError(f"{name}: expected ({len(domains)},) numbers, got {x.tolist()}")
            vectors.append(np.broadcast_to(x, (len(domains),)).tolist())
        rows = zip(check_names(domains, "domains"), *vectors, strict=True)
        return cls({name: DomainTarget(li, t, si, st, form=form) for name, li, t, si, st in rows})

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(self.by_domain)

    @property
    def loss(self) -> F64:
        """(K,) the targets, or the ends of their intervals, as `use` says."""
        return np.array([self._loss(one) for one in self.by_domain.values()])

    @property
    def l_init(self) -> F64:
        """(K,) losses before training."""
        return np.array([one.l_init for one in self.by_domain.values()])

    @property
    def se_init(self) -> F64:
        """(K,) standard errors of `l_init`."""
        return np.array([one.se_init for one in self.by_domain.values()])

    @property
    def se_target(self) -> F64:
        """(K,) standard errors of the targets."""
        return np.array([one.se_target for one in self.by_domain.values()])

    def check(self, domains: Sequence[str], held: Bool) -> None:
        """Compares domains with the targets', and warns of targets that a rule should not act on.

        Those are flagged "degenerate": no further below l_init than their errors reach. A rule that acts on one may put
        nearly all weight on its domain.

        Args:
            domains: Names, in the order of the weights.
            held: (K,) domains whose degenerate target the rule does not act on.

        Raises:
            ValueError: They are others, or in another order.
        """
        if tuple(domains) != self.domains:
            raise ValueError(f"domains: expected those of the targets, {list(self.domains)}, got {list(domains)}")
        flagged = [name for name, one in self.by_domain.items() if "degenerate" in one.flags]
        if acted_on := [name for name in flagged if not held[self.domains.index(name)]]:
            warnings.warn(
                f"targets: those of {', '.join(acted_on)} are no further below l_init than their errors reach, and "
                'this rule acts on them; the preset "robust" of Velocitune holds the weights of such domains',
                stacklevel=4,
            )

    def save(self, path: Path | str) -> None:
        """Writes a JSON file, whole or not at all; what is not a number is null."""
        tree = dataclasses.asdict(self)
        write_atomically(Path(path), json.dumps(_nulled(tree), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Targets:
        """Reads what `save` wrote, to the bit.

        Raises:
            ValueError: It is not such a file.
        """
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            by_domain = {name: _domain_target(one) for name, one in tree.pop("by_domain").items()}
            return cls(by_domain, _number(tree["tokens"]), tree["proxy"], tree["use"])
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"path: expected a file that Targets.save wrote, got {path} ({error!r})") from error

    def _loss(self, one: DomainTarget) -> float:
        return {"mean": one.target, "lower": one.low, "upper": one.high}[self.use]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _nulled(tree: object) -> object:
    if isinstance(tree, dict):
        return {name: _nulled(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_nulled(value) for value in tree]
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree


def _domain_target(tree: dict[str, Any]) -> DomainTarget:
    numbers = {name: _number(tree[name]) for name in ("low", "high", "left_out_error")}
    lists = {name: tuple(tree[name]) for name in ("residuals", "flags")}
    points = tuple(Point(*point) for point in tree["points"])
    return DomainTarget(**{**tree, **numbers, **lists, "points": points})
