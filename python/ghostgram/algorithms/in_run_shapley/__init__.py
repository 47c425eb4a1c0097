"""In-Run Data Shapley (arXiv 2406.11011): what each training sample did to the model, during the one training run."""

from ghostgram.algorithms.in_run_shapley.engine import InRunShapley
from ghostgram.algorithms.in_run_shapley.run import ShapleyResult, in_run_shapley

__all__ = ["InRunShapley", "ShapleyResult", "in_run_shapley"]
