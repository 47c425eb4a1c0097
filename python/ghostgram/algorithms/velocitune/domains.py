"""Domains that join or leave a run: changes of its saved state, each a version of weights like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ghostgram.algorithms.velocitune.quotas import integer_weights, sequence_weights
from ghostgram.algorithms.velocitune.simplex import F64, total
from ghostgram.algorithms.velocitune.state import with_domain as longer_schedule
from ghostgram.algorithms.velocitune.targets import DomainTarget, Targets
from ghostgram.algorithms.velocitune.versions import Request, as_json


def with_domain(
    state: Mapping[str, Any], name: str, size: int, weight: float, target: DomainTarget, *, length: float = 1.0
) -> dict[str, Any]:
    """The state of a Velocitune run with one domain more, the last, which has a weight from the next batch on.

    The others keep their proportions. Load it into a sampler made with the longer lists of datasets, evaluation sets
    and targets. Its prior, which a floor draws to, is the same weight.

    Args:
        state: Of a `DomainSampler`.
        name: Of the new domain.
        size: Its samples.
        weight: Its share of tokens, in (0, 1).
        target: Its losses: of the model as it is now, and to be reached.
        length: Its mean tokens, where the run declares lengths.

    Raises:
        ValueError: The name is taken, a number is out of range, or the rule is not Velocitune.
    """
    controller, rule = state["controller"], _rule_of(state)
    if not 0 < weight < 1 or size < 1 or not length > 0:
        raise ValueError(
            f"weight, size, length: expected a share in (0, 1) and positive numbers, got {weight}, {size}, {length}"
        )
    schedule = longer_schedule(state["mixture"]["schedule"], name, size)
    scaled = {field: [*(np.array(rule[field]) * (1 - weight)).tolist(), weight] for field in ("weights", "prior")}
    given = {
        **rule["given"],
        "domains": [*rule["given"]["domains"], name],
        "l_init": [*rule["given"]["l_init"], target.l_init],
        "target": [*rule["given"]["target"], target.target],
    }
    memory = dict(rule["memory"])
    if "v" in memory:
        memory["v"] = [*memory["v"], 1.0]  # nothing learned yet
    moved = {**rule, **scaled, "given": given, "memory": memory}
    moved |= {"domains": [*rule["domains"], name], "sum": [*rule["sum"], 0.0]}
    watch = controller["journal"]
    longer = {
        **controller,
        "domains": [*controller["domains"], name],
        "sizes": [*controller["sizes"], float(size)],
        "lengths": None if controller["lengths"] is None else [*controller["lengths"], length],
        "rule": moved,
        "counts": {field: [*values, 0.0] for field, values in controller["counts"].items()},
        "asked": {**controller["asked"], "draws": [*controller["asked"]["draws"], 0.0]},
        "journal": {"velocity": None, "rises": [*watch["rises"], 0]},
        "l_init": None,  # of other domains
    }
    hashes = {**state["mixture"]["hashes"], name: None}
    made = {"controller": longer, "mixture": {**state["mixture"], "schedule": schedule, "hashes": hashes}}
    return _asking(made, f"{name} joined")


def without_domain(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The state of a Velocitune run in which a domain has no weight from the next batch on, and gains none.

    It stays in the lists, evaluation sets and targets included, because the order of domains is part of the run.

    Args:
        state: Of a `DomainSampler`.
        name: Of the domain.

    Raises:
        ValueError: There is no such domain, no other has weight, or the rule is not Velocitune.
    """
    rule = _rule_of(state)
    if name not in rule["domains"]:
        raise ValueError(f"name: expected one of {rule['domains']}, got {name!r}")
    if rule["guards"]["floor"] > 0 and rule["guards"]["floor_to"] == "uniform":
        raise ValueError(
            "guards: expected a floor towards the prior, got one towards uniform weights, which would bring it back"
        )
    kept = np.array([other != name for other in rule["domains"]], np.float64)
    moved = {**rule, **{field: _shares(rule[field] * kept, name).tolist() for field in ("weights", "prior")}}
    return _asking({**state, "controller": {**state["controller"], "rule": moved}}, f"{name} left")


def targets_with(targets: Targets, name: str, target: DomainTarget) -> Targets:
    """Targets of one domain more, the last."""
    return Targets({**targets.by_domain, name: target}, targets.tokens, targets.proxy, targets.use)


def _rule_of(state: Mapping[str, Any]) -> dict[str, Any]:
    rule: dict[str, Any] = state["controller"]["rule"]
    if rule["rule"] != "velocitune":
        raise ValueError(f"rule: expected velocitune, whose memory can grow by a domain, got {rule['rule']}")
    return rule


def _shares(values: F64, name: str) -> F64:
    if not total(values) > 0:
        raise ValueError(f"name: expected that other domains have weight, got all of it in {name!r}")
    return np.asarray(values / total(values))


def _asking(state: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """The state whose schedule opens a version of the rule's weights at the next batch, whatever else was asked for."""
    mixture, rule = state["mixture"], state["controller"]["rule"]
    schedule = mixture["schedule"]
    last: Mapping[str, Any] = [*schedule["history"], *schedule["asked"]][-1]
    lengths: Sequence[float] | None = state["controller"]["lengths"]
    whole = integer_weights(sequence_weights(np.array(rule["weights"]), lengths))
    asked = Request(schedule["batch"], whole, last["batch"], None if lengths is None else tuple(lengths), reason)
    return {**state, "mixture": {**mixture, "schedule": {**schedule, "asked": [as_json(asked)]}}}
