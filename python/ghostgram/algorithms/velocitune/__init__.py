"""Velocitune: domain weights for continual pre-training that follow each domain's learning velocity, and its rivals."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghostgram.algorithms.velocitune.controller import MixtureController
    from ghostgram.algorithms.velocitune.domain_sampler import DomainSampler
    from ghostgram.algorithms.velocitune.evaluate import DomainLosses, evaluate_domains
    from ghostgram.algorithms.velocitune.loader import DynamicMixture
    from ghostgram.algorithms.velocitune.run import velocitune
    from ghostgram.algorithms.velocitune.targets import Targets
    from ghostgram.algorithms.velocitune.token_file import TokenFile

# Evaluation and loading need torch; rules, targets and schedules do not.
_HOMES = {
    "DomainLosses": "evaluate",
    "DomainSampler": "domain_sampler",
    "DynamicMixture": "loader",
    "MixtureController": "controller",
    "Targets": "targets",
    "TokenFile": "token_file",
    "evaluate_domains": "evaluate",
    "velocitune": "run",
}

__all__ = [
    "DomainLosses",
    "DomainSampler",
    "DynamicMixture",
    "MixtureController",
    "Targets",
    "TokenFile",
    "evaluate_domains",
    "velocitune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ghostgram.algorithms.velocitune' has no attribute {name!r}")
    return getattr(import_module(f"ghostgram.algorithms.velocitune.{_HOMES[name]}"), name)
