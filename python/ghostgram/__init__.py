"""Per-sample gradient statistics without per-sample gradients, and four data-selection methods on top of them."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ghostgram.ops.adam_dots import adam_dots
from ghostgram.ops.affine_stats import AffineStats, affine_stats
from ghostgram.ops.embedding_stats import EmbeddingStats, embedding_stats
from ghostgram.ops.grad_dots import grad_dots
from ghostgram.ops.grad_gram import grad_gram
from ghostgram.ops.grad_norms import grad_norms
from ghostgram.ops.grad_project import grad_project, grad_sketch
from ghostgram.ops.grad_stats import GradStats, grad_stats
from ghostgram.ops.gumbel_topk import GumbelTopK, gumbel_topk
from ghostgram.ops.softmax_stats import SoftmaxStats, el2n, softmax_stats
from ghostgram.ops.trajectory_match import TrajectoryGrad, trajectory_match, trajectory_match_grad

if TYPE_CHECKING:
    from ghostgram.algorithms.in_run_shapley import (
        AuditError,
        InRunShapley,
        RotatingPool,
        ShapleyResult,
        in_run_shapley,
    )
    from ghostgram.algorithms.mates import mates
    from ghostgram.algorithms.pad import DistilledSet, pad
    from ghostgram.algorithms.velocitune import velocitune

__version__ = version("ghostgram")

# The methods need torch; the primitives, and so `import ghostgram`, do not.
_METHODS = {
    "AuditError": "in_run_shapley",
    "DistilledSet": "pad",
    "InRunShapley": "in_run_shapley",
    "RotatingPool": "in_run_shapley",
    "ShapleyResult": "in_run_shapley",
    "in_run_shapley": "in_run_shapley",
    "mates": "mates",
    "pad": "pad",
    "velocitune": "velocitune",
}

__all__ = [
    "AffineStats",
    "AuditError",
    "DistilledSet",
    "EmbeddingStats",
    "GradStats",
    "GumbelTopK",
    "InRunShapley",
    "RotatingPool",
    "ShapleyResult",
    "SoftmaxStats",
    "TrajectoryGrad",
    "adam_dots",
    "affine_stats",
    "el2n",
    "embedding_stats",
    "grad_dots",
    "grad_gram",
    "grad_norms",
    "grad_project",
    "grad_sketch",
    "grad_stats",
    "gumbel_topk",
    "in_run_shapley",
    "mates",
    "pad",
    "softmax_stats",
    "trajectory_match",
    "trajectory_match_grad",
    "velocitune",
]


def __getattr__(name: str) -> Any:
    if name not in _METHODS:
        raise AttributeError(f"module 'ghostgram' has no attribute {name!r}")
    return getattr(import_module(f"ghostgram.algorithms.{_METHODS[name]}"), name)
