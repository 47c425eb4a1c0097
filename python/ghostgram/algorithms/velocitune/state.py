"""Where a schedule stands, as an object that is never changed and as what JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghostgram.algorithms.velocitune.quotas import EarliestDeadline
from ghostgram.algorithms.velocitune.versions import Request, Version, as_json, from_json

FORMAT = 1
"""Of states; it changes when one would be read as another run."""


@dataclass(frozen=True)
class Place:
    """Where a schedule stands before a batch. Never changed, so that earlier ones can be gone back to."""

    batch: int
    versions: int
    """Opened so far."""
    requests: int
    """Answered so far."""
    turn: EarliestDeadline
    cursors: tuple[int, ...]
    """(K,) draws of each domain."""
    masked: frozenset[int]
    """Domains that the cap has taken out."""


def to_json(place: Place, history: Sequence[Version], requests: Sequence[Request]) -> dict[str, Any]:
    """A place, the versions before it and the requests that are not answered there."""
    return {
        "batch": place.batch,
        "position": place.turn.position,
        "counts": list(place.turn.counts),
        "cursors": list(place.cursors),
        "masked": sorted(place.masked),
        "history": [as_json(version) for version in history[: place.versions]],
        "asked": [as_json(request) for request in requests[place.requests :]],
    }


def of_json(state: Mapping[str, Any]) -> tuple[Place, list[Version], list[Request]]:
    """What `to_json` was given. The version that governs is the first request, answered: others are asked after it."""
    history = [Version(**from_json(saved)) for saved in state["history"]]
    asked = [Request(**from_json(saved)) for saved in state["asked"]]
    if history:
        now = history[-1]
        turn = EarliestDeadline(now.weights, now.carry, state["position"], state["counts"])
        answered = [Request(now.first, now.weights, now.batch, now.lengths)]
    else:
        turn, answered = EarliestDeadline(asked[0].weights), []
    cursors, masked = tuple(state["cursors"]), frozenset(state["masked"])
    return Place(state["batch"], len(history), len(answered), turn, cursors, masked), history, answered + asked


def with_domain(state: Mapping[str, Any], name: str, size: int | None) -> dict[str, Any]:
    """The state of a run with one domain more, the last, that no batch has been drawn from and none will be yet.

    Load it into a schedule or mixture of the longer list and ask for weights of all of them: that is a version like any
    other. A domain is dropped by weight 0; it stays in the list, because the order of domains is part of the run.

    Args:
        state: Of a `Schedule`, or the part "schedule" of a mixture's.
        name: Of the new domain.
        size: Its samples; None for a stream.

    Raises:
        ValueError: There is a domain of this name.
    """
    if name in state["domains"]:
        raise ValueError(f"name: expected one that is not in {state['domains']}, got {name!r}")

    def longer(entry: Mapping[str, Any]) -> dict[str, Any]:
        added = {"weights": 0, "carry": 0, "lengths": 1.0}
        return {key: [*value, added[key]] if key in added and value is not None else value
                for key, value in entry.items()}  # fmt: skip

    return {
        **state,
        "domains": [*state["domains"], name],
        "sizes": [*state["sizes"], size],
        "counts": [*state["counts"], 0],
        "cursors": [*state["cursors"], 0],
        "history": [longer(version) for version in state["history"]],
        "asked": [longer(request) for request in state["asked"]],
    }
