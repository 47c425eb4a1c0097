"""In-Run Data Shapley (arXiv 2406.11011): what each training sample did to the model, during the one training run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghostgram.algorithms.in_run_shapley.audit import AuditError
    from ghostgram.algorithms.in_run_shapley.engine import InRunShapley
    from ghostgram.algorithms.in_run_shapley.run import ShapleyResult, in_run_shapley
    from ghostgram.algorithms.in_run_shapley.validation import RotatingPool

# Valuing needs torch; reading a log (`reading`, `aggregate`, `timeline`) does not.
_HOMES = {
    "AuditError": "audit",
    "InRunShapley": "engine",
    "RotatingPool": "validation",
    "ShapleyResult": "run",
    "in_run_shapley": "run",
}

__all__ = ["AuditError", "InRunShapley", "RotatingPool", "ShapleyResult", "in_run_shapley"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ghostgram.algorithms.in_run_shapley' has no attribute {name!r}")
    return getattr(import_module(f"ghostgram.algorithms.in_run_shapley.{_HOMES[name]}"), name)
