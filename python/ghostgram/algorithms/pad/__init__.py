"""PAD (arXiv 2408.03360): dataset distillation by masked trajectory matching, with difficulty-aligned data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghostgram.algorithms.pad.outputs import DistilledSet
    from ghostgram.algorithms.pad.presets import preset
    from ghostgram.algorithms.pad.run import Run, pad
    from ghostgram.algorithms.pad.settings import Settings

# What is run needs torch; settings do not.
_HOMES = {
    "DistilledSet": "outputs",
    "Run": "run",
    "Settings": "settings",
    "pad": "run",
    "preset": "presets",
}

__all__ = ["DistilledSet", "Run", "Settings", "pad", "preset"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ghostgram.algorithms.pad' has no attribute {name!r}")
    return getattr(import_module(f"ghostgram.algorithms.pad.{_HOMES[name]}"), name)
