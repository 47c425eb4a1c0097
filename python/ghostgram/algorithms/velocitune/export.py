"""What the weights of a run were: how much they asked for, and the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ghostgram._files import write_atomically
from ghostgram.algorithms.velocitune.replay import stages
from ghostgram.algorithms.velocitune.simplex import F64
from ghostgram.algorithms.velocitune.versions import Version


class Asked:
    """How many samples of each domain weights have asked for, over the batches trained on.

    Args:
        domains: K.
    """

    def __init__(self, domains: int) -> None:
        self.draws = np.zeros(domains)
        """(K,) fractions of samples included."""
        self.batches, self.versions = 0, 0
        """Batches that are counted, and versions that governed them."""

    def through(self, batch: int, history: Sequence[Version]) -> None:
        """Counts batches up to this one.

        Args:
            batch: The last one trained on.
            history: Versions so far, at least those that governed it.
        """
        until = batch + 1
        for version in reversed(history):
            first = max(version.first, self.batches)
            if until > first:
                self.draws += (until - first) * version.batch * version.shares
                self.versions = max(self.versions, version.number + 1)
                until = first
            if until <= self.batches:
                break
        self.batches = max(self.batches, batch + 1)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"draws": self.draws.tolist(), "batches": self.batches, "versions": self.versions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        self.draws = np.array(state["draws"])
        self.batches, self.versions = int(state["batches"]), int(state["versions"])


@dataclass(frozen=True)
class Mixture:
    """The weights of a run."""

    domains: tuple[str, ...]
    final: F64
    """(K,) the last ones decided, shares of tokens."""
    mean: F64
    """(K,) over all tokens trained on: a static mixture that asks for as much of each domain."""
    run: Mapping[str, Any]
    """The state of the schedule: what `replay` takes."""
    settings: Mapping[str, str]

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The weights as stages, for frameworks that take mixtures only so: see `replay.stages`."""
        return stages(self.run)

    def save(self, path: str | Path) -> None:
        """Writes a JSON file, whole or not at all: domains, final, mean, stages, run and settings."""
        tree = {"domains": list(self.domains), "final": self.final.tolist(), "mean": self.mean.tolist()}
        tree |= {"stages": self.stages, "run": self.run, "settings": dict(self.settings)}
        write_atomically(Path(path), json.dumps(tree, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Mixture:
        """Reads what `save` wrote.

        Raises:
            ValueError: It is not such a file.
        """
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            final, mean = np.array(tree["final"], np.float64), np.array(tree["mean"], np.float64)
            return cls(tuple(tree["domains"]), final, mean, tree["run"], tree["settings"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"path: expected a file that Mixture.save wrote, got {path} ({error!r})") from error
