"""Target losses from measured ones: a scaling law for each domain, its interval, and refusals to guess."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ghostgram.algorithms.velocitune.fits import Fit, Shape, anchored, chinchilla, chinchilla_nd, fit, geometric_mean
from ghostgram.algorithms.velocitune.simplex import F64, check_names
from ghostgram.algorithms.velocitune.targets import DomainTarget, Point, Targets, Use
from ghostgram.algorithms.velocitune.velocity import degenerate

Law = Literal["chinchilla", "chinchilla_nd", "anchored"]
Form = Literal["auto", "chinchilla", "chinchilla_nd", "anchored", "last_checkpoint", "none"]
Reason = Literal["points", "span", "far", "interval", "bound"]

_PARAMETERS: Mapping[str, int] = {"chinchilla": 3, "chinchilla_nd": 5, "anchored": 3}
_LEAST_SPAN, _FAR, _TOO_FAR, _WIDEST = 4.0, 8.0, 16.0, 0.5
_STEPS = 5  # of a resample: percentiles of 5 steps and of 200 agree in 8 digits
_Z = 1.6448536269514722  # of a 90 % interval


class UnderdeterminedFit(ValueError):
    """The points of a domain do not determine its target.

    `domain` and `reason` say which, and why: a reason can be passed to `allow`.
    """

    def __init__(self, domain: str, reason: Reason, why: str) -> None:
        super().__init__(f"points of {domain!r}: {why}; allow={{{reason!r}}} would go on")
        self.domain, self.reason = domain, reason


@dataclass(frozen=True)
class _Asked:
    """Settings of an estimate."""

    tokens: float
    form: Form
    size: float | None
    robust: bool
    prior: bool
    allow: frozenset[str]
    k: float
    resamples: int
    seed: int


def estimate_targets(
    points: Mapping[str, Sequence[Point]],
    l_init: Mapping[str, tuple[float, float]],
    tokens: float,
    form: Form = "auto",
    *,
    size: float | None = None,
    robust: bool = False,
    prior: bool = True,
    use: Use = "mean",
    allow: Collection[Reason] = (),
    k: float = 3.0,
    resamples: int = 500,
    seed: int = 0,
) -> Targets:
    """The loss of every domain after `tokens` tokens, extrapolated from shorter runs of the same mixture.

    Args:
        points: Measured losses of each domain, in the order of domains; at least 5 sizes, log-spaced over 1/64 to 1/4
            of `tokens`, each of a run with a learning-rate decay of its own. Checkpoints inside one cosine schedule
            are not points of any law.
        l_init: (loss, standard error) of each domain before training, on the same evaluation sets.
        tokens: D of the whole run, all domains together.
        form: "chinchilla", the paper's, for training from scratch; "anchored" for continued training; "chinchilla_nd"
            for points of several model sizes; "auto": of "chinchilla" and "anchored", whichever predicts the largest D
            better from the others. "last_checkpoint" is the loss at the largest D, "none" is 0, so that
            `V = l / l_init`.
        size: N of the model to be trained, for "chinchilla_nd".
        robust: Whether outlying points count linearly: `fits.fit`.
        prior: Whether "anchored" has its weak prior of the exponent: `fits.anchored`.
        use: What is passed on to a rule: the target, or an end of its interval.
        allow: Refusals to go on in spite of.
        k: A target within k standard errors of `l_init` makes a domain degenerate: it is flagged, not refused.
        resamples: Refits for the interval, of losses drawn around the fitted ones by their standard errors.
        seed: Of the draws.

    Returns:
        Targets, with their 90 % intervals, laws, residuals and flags.

    Raises:
        UnderdeterminedFit: A domain has no more sizes than parameters, or fewer than 3 model sizes or 3 D for
            "chinchilla_nd" ("points"); its sizes span less than a factor of 4 ("span"); `tokens` is more than 16 times
            the largest ("far"); the interval is wider than half of `l_init - target` ("interval"); or an exponent is at
            an end of its range ("bound").
        ValueError: Points that are no numbers, other domains in `l_init`, or an unknown form or reason.

    Warns:
        UserWarning: Points scatter more than their standard errors say, which are then scaled up, or `tokens` is more
            than 8 times the largest size.

    Cost:
        `resamples` + 3 fits for each domain (`fits.fit`): with 500, some 2e7 FLOPs, tenfold with two exponents.

    Source:
        arXiv 2411.14318, section 3 (a scaling law for each domain); arXiv 2203.15556 (its form). "anchored", intervals
        and refusals are ours.
    """
    names = check_names(list(points), "points")
    if set(l_init) != set(names):
        raise ValueError(f"l_init: expected the domains of points, {list(names)}, got {list(l_init)}")
    if form not in get_args(Form):
        raise ValueError(f"form: expected one of {list(get_args(Form))}, got {form!r}")
    if unknown := set(allow) - set(get_args(Reason)):
        raise ValueError(f"allow: expected some of {list(get_args(Reason))}, got {sorted(unknown)}")
    if not 0 < tokens < np.inf or (form == "chinchilla_nd" and not (size is not None and size > 0)):
        raise ValueError(f"tokens, size: expected positive numbers, got {tokens} and {size} for {form!r}")
    if resamples < 2:
        raise ValueError(f"resamples: expected at least 2, got {resamples}")
    asked = _Asked(tokens, form, size, robust, prior, frozenset(allow), k, resamples, seed)
    found = {name: _estimate(name, _checked(name, points[name], form), l_init[name], asked) for name in names}
    measured = json.dumps([{name: [list(l_init[name]), *map(list, points[name])]} for name in names])
    return Targets(found, tokens, hashlib.sha256(measured.encode()).hexdigest(), use)


def _checked(name: str, points: Sequence[Point], form: Form) -> tuple[Point, ...]:
    given = tuple(Point(*point) for point in points)
    numbers = np.array([(p.tokens, p.loss, p.se, 1.0 if p.size is None else p.size) for p in given])
    if not len(given) or not (np.isfinite(numbers) & (numbers > 0)).all():
        raise ValueError(f"points of {name!r}: expected positive tokens, losses and standard errors, got {given}")
    if form == "chinchilla_nd" and any(p.size is None for p in given):
        raise ValueError(f"points of {name!r}: expected a model size of every point for {form!r}, got {given}")
    if form in ("auto", "chinchilla", "anchored") and len({p.size for p in given}) > 1:
        raise ValueError(f"points of {name!r}: expected one model size for {form!r}, got {given}")
    return tuple(sorted(given))


def _estimate(name: str, points: tuple[Point, ...], start: tuple[float, float], asked: _Asked) -> DomainTarget:
    loss, se = start
    if not (np.isfinite([loss, se]).all() and se >= 0):
        raise ValueError(f"l_init: expected a finite loss and a standard error of at least 0 of {name!r}, got {start}")
    if asked.form == "none":
        return DomainTarget(loss, 0.0, se, 0.0, 0.0, 0.0, "none", points=points)
    if asked.form == "last_checkpoint":
        last = points[-1]
        ends = last.loss - _Z * last.se, last.loss + _Z * last.se
        return DomainTarget(loss, last.loss, se, last.se, *ends, "last_checkpoint", points=points)
    flags = _refusals_before(name, points, asked)
    if asked.form == "auto":
        errors: dict[Law, float] = {
            law: _left_out_error(law, points, loss, asked) for law in ("chinchilla", "anchored")
        }
        if np.isnan(list(errors.values())).any():
            raise ValueError(f"form: expected a law by name for so few points of {name!r}, got {asked.form!r}")
        form = min(errors, key=lambda law: abs(errors[law]))
    else:
        form = asked.form
    return _fitted(name, form, points, (loss, se), asked, flags)


def _refusals_before(name: str, points: tuple[Point, ...], asked: _Asked) -> list[str]:
    """Flags of what was allowed; raises for the rest that can be seen before a fit."""
    flags: list[str] = []
    sizes, models = sorted({p.tokens for p in points}), {p.size for p in points}
    nd = asked.form == "chinchilla_nd"
    parameters = _PARAMETERS.get(asked.form, 3)
    if (len(points) if nd else len(sizes)) <= parameters:
        why = f"expected more than {parameters} sizes for as many parameters, got {len(points if nd else sizes)}"
        _refuse(name, "points", why, asked, flags)
    elif nd and min(len(sizes), len(models)) < 3:
        why = f"expected 3 model sizes and 3 numbers of tokens, got {len(models)} and {len(sizes)}"
        _refuse(name, "points", why, asked, flags)
    if sizes[-1] / sizes[0] < _LEAST_SPAN:
        why = f"expected sizes that span a factor of {_LEAST_SPAN:g}, got {sizes[-1] / sizes[0]:.3g}"
        _refuse(name, "span", why, asked, flags)
    reach = asked.tokens / sizes[-1]
    if reach > _TOO_FAR:
        why = f"expected tokens of at most {_TOO_FAR:g} times the largest size, got {reach:.3g} times"
        _refuse(name, "far", why, asked, flags)
    elif reach > _FAR:
        warnings.warn(f"points of {name!r}: tokens are {reach:.3g} times the largest size", stacklevel=4)
        flags.append("reaching")
    return flags


def _refuse(name: str, reason: Reason, why: str, asked: _Asked, flags: list[str]) -> None:
    if reason not in asked.allow:
        raise UnderdeterminedFit(name, reason, why)
    flags.append(reason)


def _fitted(
    name: str, form: Law, points: tuple[Point, ...], start: tuple[float, float], asked: _Asked, flags: list[str]
) -> DomainTarget:
    """The law, its interval, and what only a fit can tell."""
    measured = np.array([p.loss for p in points])
    law = _fit(form, points, measured[None], start[0], asked)
    fitted = law.at(*_places(points, form))[0]
    se = np.array([p.se for p in points])
    chi2, free = float((((measured - fitted) / se) ** 2).sum()), len(points) - _PARAMETERS[form]
    if free > 0 and chi2 > free + 3 * np.sqrt(2 * free):
        more = float(np.sqrt(chi2 / free))
        warnings.warn(f"points of {name!r} scatter {more:.3g} times as much as their standard errors say", stacklevel=4)
        se, flags = se * more, [*flags, "noisier than se"]
    at_end = ([asked.tokens], None if form != "chinchilla_nd" else [asked.size or 0.0])
    target = float(law.at(*at_end)[0, 0])
    rng = np.random.default_rng([asked.seed, *hashlib.sha256(name.encode()).digest()])
    drawn = rng.normal(fitted, se, (asked.resamples, len(se)))
    starts = rng.normal(start[0], start[1], (asked.resamples, 1))
    ends = _fit(form, points, drawn, starts, asked, _STEPS).at(*at_end)[:, 0]
    low, high = np.percentile(ends, (5, 95)).tolist()
    se_target = float(ends.std(ddof=1))
    gap = start[0] - target
    if degenerate(np.array([gap]), np.array([start[1]]), np.array([se_target]), 0.0, asked.k)[0]:
        flags = [*flags, "degenerate"]
    else:
        if high - low > _WIDEST * gap:
            why = f"expected an interval of at most half of l_init - target = {gap:.4g}, got {high - low:.4g}"
            _refuse(name, "interval", why, asked, flags)
        if stuck := law.at_bound():
            _refuse(
                name, "bound", f"expected exponents within their range, got {', '.join(stuck)} at its end", asked, flags
            )
    return DomainTarget(
        l_init=start[0],
        target=target,
        se_init=start[1],
        se_target=se_target,
        low=low,
        high=high,
        form=form,
        parameters=law.parameters(),
        points=points,
        residuals=tuple((measured - fitted).tolist()),
        left_out_error=_left_out_error(form, points, start[0], asked),
        flags=tuple(flags),
    )


def _places(points: tuple[Point, ...], form: Law) -> tuple[F64, F64 | None]:
    """D, and N if the law has one."""
    sizes = np.array([p.size for p in points], np.float64) if form == "chinchilla_nd" else None
    return np.array([p.tokens for p in points], np.float64), sizes


def _fit(form: Law, points: tuple[Point, ...], losses: F64, start: float | F64, asked: _Asked, steps: int = 60) -> Fit:
    tokens, sizes = _places(points, form)
    mean = geometric_mean(tokens)
    shapes: dict[str, Shape] = {"chinchilla": chinchilla(), "chinchilla_nd": chinchilla_nd()}
    shape = shapes.get(form) or anchored(start, (tokens.min() / mean, tokens.max() / mean), asked.prior)
    se = np.array([p.se for p in points])
    return fit(shape, tokens, losses, se, sizes, robust=asked.robust, steps=steps)


def _left_out_error(form: Law, points: tuple[Point, ...], start: float, asked: _Asked) -> float:
    """Measured less predicted loss of the largest D, from all smaller ones; nan where these are too few to fit."""
    largest = max(p.tokens for p in points)
    rest, left_out = (tuple(p for p in points if (p.tokens == largest) is last) for last in (False, True))
    if len(rest) < _PARAMETERS[form]:
        return float("nan")
    law = _fit(form, rest, np.array([[p.loss for p in rest]]), start, asked)
    return float((np.array([p.loss for p in left_out]) - law.at(*_places(left_out, form))[0]).mean())
