"""What every rule is: weights and memory, moved by observations, guarded, saved and loaded."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ghostgram.algorithms.velocitune.guards import OFF, Firing, Guards
from ghostgram.algorithms.velocitune.rules.observation import Observation, Seen
from ghostgram.algorithms.velocitune.simplex import F64, Bool, check_names, normalised, total
from ghostgram.algorithms.velocitune.targets import Targets

S = TypeVar("S")


class Proposal(NamedTuple):
    """What a rule makes of an observation, before the guards that follow it."""

    weights: F64
    memory: Mapping[str, F64] = {}
    """What the rule remembers from now on."""
    shown: Mapping[str, F64] = {}
    """(K,) what the weights came from, for reports."""
    held: Bool | None = None
    fired: tuple[Firing, ...] = ()


class Reweighter(ABC):
    """Weights of K domains that observations move.

    A subclass has a name, the fields it needs, a cadence, and `propose`, which is pure: all that a rule remembers
    between updates is `memory`. An update that raises leaves the state as it was.

    Args:
        settings: A frozen dataclass of what the rule can be told.
        preset: What `describe` calls the settings.
        guards: Composed with the rule.
        given: What else the rule was given (arrays, numbers): a state of other things is refused.
    """

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]]
    cadence: ClassVar[Literal["tokens", "every_step"]] = "tokens"
    """Whether the rule is updated after an interval of tokens, or after every optimizer step."""
    targets: Targets | None = None
    """The losses that domains are to reach, of a rule that is given them."""

    def __init__(
        self, settings: Any, preset: str, guards: Guards = OFF, given: Mapping[str, object] | None = None
    ) -> None:
        self.settings, self.preset, self.guards = settings, preset, guards
        self.given = {name: _as_json(value) for name, value in (given or {}).items()}
        self.domains: tuple[str, ...] = ()
        self.shown: Mapping[str, F64] = {}
        self.fired: tuple[Firing, ...] = ()
        self.memory: dict[str, F64] = {}
        self.updates = 0

    @property
    def needs(self) -> frozenset[str]:
        """Fields that every observation must have."""
        return self.reads | self.guards.needs

    @abstractmethod
    def propose(self, seen: Seen) -> Proposal:
        """The rule itself, from `seen`, `weights`, `prior`, `memory` and `settings`, changing none of them."""

    def start(self, prior: F64, domains: tuple[str, ...]) -> F64:
        """The weights before the first update: here the prior ones."""
        return prior

    def init(self, prior: ArrayLike, domains: Sequence[str] | None = None) -> F64:
        """Starts over.

        Args:
            prior: (K,) shares or counts of tokens.
            domains: Names in the order of `prior`; "0", "1", ... if not given.

        Returns:
            (K,) float64, the weights until the first update.

        Raises:
            ValueError: No weights, another number of names, a name twice, or a frozen domain that is not there.
        """
        shares = normalised(prior, "prior")
        names = check_names(domains if domains is not None else [str(i) for i in range(len(shares))], "domains")
        if len(names) != len(shares):
            raise ValueError(f"domains: expected {len(shares)} names as prior has, got {list(names)}")
        if missing := set(self.guards.frozen) - set(names):
            raise ValueError(f"frozen: expected some of {list(names)}, got {sorted(missing)}")
        self.weights = self.start(shares, names)
        self.prior, self.domains = shares, names
        self._sum = self.weights.copy()
        self.updates, self.memory, self.shown, self.fired = 0, {}, {}, ()
        return self.weights.copy()

    def update(self, obs: Observation) -> F64:
        """Moves the weights by what was observed; `shown` and `fired` then say why.

        Returns:
            (K,) float64 on the simplex.

        Raises:
            ValueError: A field that is needed is absent, of another length or not finite.
            RuntimeError: `init` or `load_state_dict` did not come first.
        """
        if not self.domains:
            raise RuntimeError(f"{self.name}: expected init(prior) or load_state_dict before the first update")
        none = np.zeros(len(self.domains))
        seen = Seen(obs, self.needs, len(none), self.name)
        made = self.propose(seen)
        samples, avail = (seen["seen"], seen["avail"]) if self.guards.max_epochs is not None else (none, none)
        held = none.astype(bool) if made.held is None else made.held
        weights, fired = self.guards.after(self.weights, made.weights, self.prior, self.domains, held, samples, avail)
        self.weights, self.memory = weights, dict(made.memory)
        self.shown, self.fired = made.shown, (*made.fired, *fired)
        self._sum = self._sum + weights
        self.updates += 1
        return weights.copy()

    @property
    def mean_weights(self) -> F64:
        """(K,) the mean of the weights over the start and all updates."""
        return self._sum / total(self._sum)

    def describe(self) -> str:
        """The rule, its preset and everything that is set, one a line."""
        lines = [f"{self.name}-{self.preset}", f"  cadence = {self.cadence}"]
        for part in (self.settings, self.guards):
            prefix = "guards." if part is self.guards else ""
            lines += [f"  {prefix}{name} = {value!r}" for name, value in _plain(part).items()]
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on bit for bit; plain lists and numbers, fit for JSON."""
        if not self.domains:
            raise RuntimeError(f"{self.name}: expected init(prior) before state_dict")
        return {
            "rule": self.name,
            "settings": _plain(self.settings),
            "guards": _plain(self.guards),
            "given": self.given,
            "domains": list(self.domains),
            "prior": self.prior.tolist(),
            "weights": self.weights.tolist(),
            "sum": self._sum.tolist(),
            "updates": self.updates,
            "memory": {name: value.tolist() for name, value in self.memory.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: It is of another rule, of other settings or guards, or of other domains or another order of
                them than `init` was called with, if it was.
        """
        ours: dict[str, Any] = {"rule": self.name, "settings": _plain(self.settings), "guards": _plain(self.guards)}
        ours["given"] = self.given
        if self.domains:
            ours["domains"] = list(self.domains)
        for name, value in ours.items():
            if state[name] != value:
                raise ValueError(f"{name}: expected the state of {value}, got that of {state[name]}")
        self.domains = tuple(state["domains"])
        self.prior, self.weights, self._sum = (np.array(state[name]) for name in ("prior", "weights", "sum"))
        self.updates = state["updates"]
        self.memory = {name: np.array(value, np.float64) for name, value in state["memory"].items()}
        self.shown, self.fired = {}, ()


def chosen(presets: Mapping[str, S], preset: str | S, rule: str) -> tuple[S, str]:
    """The settings of a preset's name, or the settings themselves, and what to call them.

    Raises:
        ValueError: No preset has the name.
    """
    if not isinstance(preset, str):
        return preset, "custom"
    if preset not in presets:
        raise ValueError(f"preset: expected one of {list(presets)} of {rule}, or its settings, got {preset!r}")
    return presets[preset], preset


def _plain(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass as what JSON gives back."""
    kept = [f.name for f in dataclasses.fields(settings) if f.metadata.get("kept", True)]
    return {name: _as_json(getattr(settings, name)) for name in kept}


def _as_json(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_as_json(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray) else value
