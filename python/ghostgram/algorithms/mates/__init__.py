"""MATES (arXiv 2406.06046): the model being trained chooses its next data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghostgram.algorithms.mates.dataset import PlanDataset
    from ghostgram.algorithms.mates.files.pool import Pool
    from ghostgram.algorithms.mates.labels.reference import Reference
    from ghostgram.algorithms.mates.labels.task import Task
    from ghostgram.algorithms.mates.loop import StageLoop
    from ghostgram.algorithms.mates.run import Selection, mates

# Labels and training need torch; pools, scores and selection do not.
_HOMES = {
    "PlanDataset": "dataset",
    "Pool": "files.pool",
    "Reference": "labels.reference",
    "Selection": "run",
    "StageLoop": "loop",
    "Task": "labels.task",
    "mates": "run",
}

__all__ = ["PlanDataset", "Pool", "Reference", "Selection", "StageLoop", "Task", "mates"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ghostgram.algorithms.mates' has no attribute {name!r}")
    return getattr(import_module(f"ghostgram.algorithms.mates.{_HOMES[name]}"), name)
