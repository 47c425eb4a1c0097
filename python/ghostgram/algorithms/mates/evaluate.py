"""Comparing ways to choose data: the branch that is evaluated, equal budgets, and differences of paired runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

DECAY_STEPS = 200
HALF_LIFE = 50


def decay_factor(step: int, steps: int = DECAY_STEPS, half_life: int = HALF_LIFE) -> float:
    """The learning rate of a decay branch over the peak, `0.5^(step / half_life)`.

    A run whose rate is warmed up and then constant is compared by branches: from a checkpoint, `steps` steps on the
    stage's selected data with this rate, which ends at 1/16 of the peak. It is a `LambdaLR` factor as it stands.

    Args:
        step: From 0 to `steps`.
        steps: Of the branch.
        half_life: Steps in which the rate halves.

    Raises:
        ValueError: The step is outside the branch.

    Source:
        The WSD schedule's decay as MATES uses it (arXiv 2406.06046): 1e-3 to 6.25e-5 in 200 steps.
    """
    if not 0 <= step <= steps:
        raise ValueError(f"step: expected 0 to {steps}, got {step}")
    return float(0.5 ** (step / half_life))


class Arm(NamedTuple):
    """One way to choose data, and what it may spend."""

    tokens: int
    overhead: float  # operations beside training
    flops: float  # in all


def arms(overheads: Mapping[str, float], tokens: int, flops_per_token: float, equal: str = "tokens") -> dict[str, Arm]:
    """The budgets under which ways to choose data are compared.

    With equal "tokens" every arm trains on as many. With equal "flops" every arm spends what the dearest does with
    `tokens`, so that cheap ways, random choice above all, get the difference back as tokens.

    Args:
        overheads: Operations of choosing, by arm; 0 for random choice.
        tokens: That the dearest arm trains on.
        flops_per_token: Of training.
        equal: "tokens" or "flops".

    Raises:
        ValueError: A number is negative, nothing is compared, or `equal` is another word.
    """
    if equal not in ("tokens", "flops"):
        raise ValueError(f'equal: expected "tokens" or "flops", got {equal!r}')
    if not overheads or tokens < 0 or not flops_per_token > 0 or min(overheads.values()) < 0:
        raise ValueError(
            "overheads, tokens, flops_per_token: expected some arms and no negative number, "
            f"got {dict(overheads)}, {tokens} and {flops_per_token}"
        )
    dearest = max(overheads.values())
    compared = {}
    for name, overhead in overheads.items():
        back = math.floor((dearest - overhead) / flops_per_token) if equal == "flops" else 0
        compared[name] = Arm(tokens + back, overhead, (tokens + back) * flops_per_token + overhead)
    return compared


class Paired(NamedTuple):
    """A mean difference with its confidence interval."""

    mean: float
    low: float
    high: float
    runs: int


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float], level: float = 0.95) -> Paired:
    """The mean of `ours - theirs` over runs that share everything but the data, with Student's interval.

    Args:
        ours: A metric by seed.
        theirs: The same metric of the other arm, of the same seeds.
        level: The share of intervals that hold the true mean, if differences are normal.

    Raises:
        ValueError: The seeds differ or are fewer than 2, or the level is outside (0, 1).
    """
    if set(ours) != set(theirs) or len(ours) < 2:
        raise ValueError(f"ours, theirs: expected the same seeds, 2 at least, got {sorted(ours)} and {sorted(theirs)}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours)]
    n = len(differences)
    mean = math.fsum(differences) / n
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (n - 1)
    reach = _student_reach(level, n - 1) * math.sqrt(variance / n)
    return Paired(mean, mean - reach, mean + reach, n)


def _student_reach(level: float, freedom: int) -> float:
    """t with P(|T| < t) = level: the finite series of the distribution, bisected in the angle atan(t / sqrt(freedom)).

    Source:
        Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        if _inside(angle, freedom) < level:
            low = angle
        else:
            high = angle
    return math.tan(low) * math.sqrt(freedom)


def _inside(angle: float, freedom: int) -> float:
    """P(|T| < tan(angle) sqrt(freedom))."""
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for i in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
