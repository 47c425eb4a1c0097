"""In-Run Data Shapley (arXiv 2406.11011): what each training sample did to the model, during the one training run."""

from ghostgram.algorithms.in_run_shapley.audit import AuditError
from ghostgram.algorithms.in_run_shapley.engine import InRunShapley
from ghostgram.algorithms.in_run_shapley.run import ShapleyResult, in_run_shapley
from ghostgram.algorithms.in_run_shapley.validation import RotatingPool

__all__ = ["AuditError", "InRunShapley", "RotatingPool", "ShapleyResult", "in_run_shapley"]
