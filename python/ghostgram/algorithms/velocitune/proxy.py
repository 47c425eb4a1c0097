"""Proxy runs: the same model trained on several shorter budgets, and the points of laws that come of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ghostgram._files import write_atomically
from ghostgram.algorithms.velocitune.targets import Point

Losses = Mapping[str, tuple[float, float]]
"""Loss and its standard error (nats per token) of each domain."""


def proxy_sizes(tokens: int, count: int = 5, smallest: float = 1 / 64, largest: float = 1 / 4) -> list[int]:
    """Log-spaced budgets to train on for targets at `tokens`.

    Args:
        tokens: D of the whole run.
        count: How many.
        smallest: The first, as a share of `tokens`.
        largest: The last.

    Raises:
        ValueError: Fewer than 2, shares that are not rising within (0, 1], or budgets that round to the same number.
    """
    if count < 2 or not 0 < smallest < largest <= 1:
        raise ValueError(
            f"count, smallest, largest: expected at least 2 sizes between rising shares of (0, 1], "
            f"got {count}, {smallest}, {largest}"
        )
    sizes = [round(size) for size in (tokens * np.geomspace(smallest, largest, count)).tolist()]
    if len(set(sizes)) < count or sizes[0] < 1:
        raise ValueError(f"tokens: expected enough for {count} different sizes, got {tokens}: {sizes}")
    return sizes


def proxy_points(
    train: Callable[[int], Losses], sizes: Sequence[int], *, record: Path | str | None = None, size: float | None = None
) -> dict[str, list[Point]]:
    """Trains once for each size, and collects each domain's losses: what `estimate_targets` takes.

    Args:
        train: Trains a model from the same start as the main run on so many tokens of the original mixture, its
            learning rate decayed at the end, and returns the losses of every domain on the main run's evaluation sets.
        sizes: Tokens of each run.
        record: A JSON file that every finished run is written to, whole or not at all. Runs that it holds are not run
            again, so a driver that was killed goes on with the one it was at.
        size: N of the model, noted in every point.

    Returns:
        Points by domain, in the order of the domains of the first run, by rising tokens.

    Raises:
        ValueError: Sizes that repeat or are not positive, a run whose domains are not those of the first, a loss that
            is no number, or a record that is not one.

    Cost:
        6 N FLOPs a token of all sizes: for 5 sizes from 1/64 to 1/4, .48 of what the main run costs.
    """
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"sizes: expected different positive numbers of tokens, got {list(sizes)}")
    runs = {} if record is None else _read(Path(record))
    for tokens in sorted(sizes):
        if tokens in runs:
            continue
        losses = {name: (float(loss), float(se)) for name, (loss, se) in train(tokens).items()}
        if not losses or not np.isfinite(list(losses.values())).all():
            raise ValueError(f"train: expected finite losses of every domain after {tokens} tokens, got {losses}")
        runs[tokens] = losses
        if record is not None:
            text = json.dumps({str(done): run for done, run in sorted(runs.items())}, indent=1)
            write_atomically(Path(record), text + "\n")
    wanted = [(tokens, runs[tokens]) for tokens in sorted(sizes)]
    domains = list(wanted[0][1])
    for tokens, run in wanted:
        if set(run) != set(domains):
            raise ValueError(f"train: expected losses of {domains} after {tokens} tokens, got those of {list(run)}")
    return {name: [Point(tokens, *run[name], size) for tokens, run in wanted] for name in domains}


def _read(record: Path) -> dict[int, Losses]:
    if not record.exists():
        return {}
    try:
        runs = json.loads(record.read_text(encoding="utf-8"))
        return {
            int(tokens): {name: (float(loss), float(se)) for name, (loss, se) in run.items()}
            for tokens, run in runs.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"record: expected a file that proxy_points wrote, got {record} ({error})") from error
