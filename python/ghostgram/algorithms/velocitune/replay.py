"""The schedule of a finished run again: as it was, in another order, or with constant weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ghostgram.algorithms.velocitune.draws import REPLAY, shuffled
from ghostgram.algorithms.velocitune.quotas import integer_weights
from ghostgram.algorithms.velocitune.sampler import Schedule
from ghostgram.algorithms.velocitune.versions import Request, Version, from_json

KINDS = ("exact", "shuffled", "reversed", "final", "average", "stretched")
RESAMPLES = 10_000
"""Of the bootstrap."""

ALL_SIGNS = 16
"""Up to so many runs every choice of signs is counted; beyond, `RESAMPLES` of them are drawn."""


class Replay(NamedTuple):
    """What to train on in place of the run."""

    schedule: Schedule
    batches: int
    """After which it has drawn as much as it is to; the schedule itself goes on without end."""


class _Segment(NamedTuple):
    """The batches of one version."""

    version: Version
    batches: int


def replay(run: Mapping[str, Any], kind: str, *, seed: int = 0, batches: int | None = None) -> Replay:
    """A schedule made of a finished one, to tell what its order has done from what its mixture has.

    | kind | what it is |
    |---|---|
    | `exact` | the run |
    | `shuffled` | its segments, the batches of one version each, in another order |
    | `reversed` | its segments from the last to the first |
    | `final` | its last weights throughout |
    | `average` | its domains' shares of all sequences throughout |
    | `stretched` | its weights over another number of batches |

    Segments are replayed with the domain of every position that they had, not with weights that may round otherwise,
    and samples only depend on how many draws came before. So the first three train on the same samples, each as often,
    and order is the single difference. `average` draws from each domain as often as the run did, to one.

    Args:
        run: The state of the run's schedule at its end: of a `Schedule`, or the part "schedule" of a mixture's.
        kind: As above.
        seed: Of the order of segments, for `shuffled`.
        batches: For `stretched`, how many.

    Raises:
        ValueError: The kind is another word, the run has no batches, `shuffled` or `reversed` would be the run itself,
            or `batches` is given or lacking against the kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {list(KINDS)}, got {kind!r}")
    if (kind == "stretched") != (batches is not None) or (batches is not None and batches < 1):
        raise ValueError(f"batches: expected a number for 'stretched' and None for others, got {batches} for {kind!r}")
    segments = _segments(run)
    if not segments:
        raise ValueError("run: expected at least one batch, got the state of a run that has not begun")
    if kind in ("shuffled", "reversed") and len(segments) == 1:
        raise ValueError(f"run: expected at least two segments to be {kind}, got one version of weights")
    total = sum(segment.batches for segment in segments)
    if kind in ("exact", "shuffled", "reversed"):
        requests = _as_they_were([segments[place] for place in _order(kind, len(segments), seed)])
    elif kind == "stretched":
        assert batches is not None
        requests, total = [_request(v, v.first * batches // total, v.weights) for v, _ in segments], batches
    else:
        weights = segments[-1].version.weights if kind == "final" else integer_weights(run["cursors"])
        requests = [_request(version, version.first, weights) for version, _ in segments]
    sizes = dict(zip(run["domains"], run["sizes"], strict=True))
    return Replay(Schedule.scripted(sizes, requests, seed=run["seed"], quotas=run["quotas"]), total)


def stages(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run's weights as stages, for frameworks that take mixtures only so; JSON can hold them.

    Args:
        run: As in `replay`.

    Returns:
        For each version that has governed batches: `first_sequence`, `sequences`, and `weights` by domain, shares of
        sequences that add up to 1.
    """
    found, first = [], 0
    for version, batches in _segments(run):
        shares = dict(zip(run["domains"], version.shares.tolist(), strict=True))
        found.append({"first_sequence": first, "sequences": batches * version.batch, "weights": shares})
        first += batches * version.batch
    return found


class Difference(NamedTuple):
    """Of two arms in one domain, over runs that share their seeds."""

    domain: str
    mean: float
    low: float
    high: float
    p: float
    verdict: str
    """"lower", "higher" or "not distinguishable"."""


def compare_orders(
    domains: Sequence[str], ours: ArrayLike, theirs: ArrayLike, *, level: float = 0.95, seed: int = 0
) -> list[Difference]:
    """Paired differences `ours - theirs` of every domain, and whether they can be told from chance.

    The interval is the percentile bootstrap over runs. With few runs it is too narrow: of three whose differences are
    pure chance it leaves out 0 in one case of four. So a difference is called one only if, besides, an exact test that
    flips signs of runs finds it less likely than 1 - level; that takes six runs at .95, and fewer are never enough.

    Args:
        domains: K names.
        ours: (runs, K) losses, a row for each seed.
        theirs: (runs, K) losses of the other arm, the same seeds in the same order.
        level: Of the interval.
        seed: Of the bootstrap.

    Raises:
        ValueError: Shapes differ, there are fewer than three runs, or the level is outside (0, 1).

    Cost:
        10,000 resamples, and 2^runs signs up to 16 runs.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] != len(domains) or len(a) < 3:
        raise ValueError(
            f"ours, theirs: expected at least three runs of {len(domains)} domains, got {a.shape} and {b.shape}"
        )
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    generator, runs = np.random.Generator(np.random.Philox(seed)), len(a)
    differences = a - b
    resampled = differences[generator.integers(0, runs, (RESAMPLES, runs))].mean(axis=1)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    if runs <= ALL_SIGNS:
        signs = np.array(list(product((1.0, -1.0), repeat=runs)))
    else:
        signs = np.concatenate([np.ones((1, runs)), generator.choice([1.0, -1.0], (RESAMPLES, runs))])
    means = differences.mean(axis=0)
    as_far = np.abs(signs @ differences / runs) >= np.abs(means) * (1 - 1e-12)
    found = []
    for k, name in enumerate(domains):
        p = float(as_far[:, k].mean())
        sure = p < 1 - level and not low[k] <= 0 <= high[k]
        verdict = ("lower" if means[k] < 0 else "higher") if sure else "not distinguishable"
        found.append(Difference(name, float(means[k]), float(low[k]), float(high[k]), p, verdict))
    return found


def _segments(run: Mapping[str, Any]) -> list[_Segment]:
    """The versions that govern at least one batch."""
    history = [Version(**from_json(saved)) for saved in run["history"]]
    ends = [*(version.first for version in history), run["batch"]][1:]
    return [_Segment(v, end - v.first) for v, end in zip(history, ends, strict=True) if end > v.first]


def _order(kind: str, n: int, seed: int) -> list[int]:
    """Places of segments; "shuffled" is drawn until it is another order than the run's."""
    if kind != "shuffled":
        return list(range(n))[:: -1 if kind == "reversed" else 1]
    attempt, order = 0, list(range(n))
    while order == list(range(n)):
        order, attempt = shuffled(seed, REPLAY, attempt, 0, n).tolist(), attempt + 1
    return order


def _as_they_were(segments: Sequence[_Segment]) -> list[Request]:
    """Segments one after another, each beginning with what its domains were owed and, if drawn, its own quotas."""
    requests, first = [], 0
    for version, batches in segments:
        asked = _request(version, first, version.weights)
        requests.append(asked._replace(carry=version.carry, origin=version.origin))
        first += batches
    return requests


def _request(version: Version, first: int, weights: tuple[int, ...]) -> Request:
    return Request(first, weights, version.batch, version.lengths, f"replay of version {version.number}")
