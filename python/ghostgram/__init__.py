"""Per-sample gradient statistics without per-sample gradients, and four data-selection methods on top of them."""

from importlib.metadata import version

from ghostgram.ops.affine_stats import AffineStats, affine_stats
from ghostgram.ops.embedding_stats import EmbeddingStats, embedding_stats
from ghostgram.ops.grad_dots import grad_dots
from ghostgram.ops.grad_gram import grad_gram
from ghostgram.ops.grad_norms import grad_norms
from ghostgram.ops.grad_stats import GradStats, grad_stats

__version__ = version("ghostgram")

__all__ = [
    "AffineStats",
    "EmbeddingStats",
    "GradStats",
    "affine_stats",
    "embedding_stats",
    "grad_dots",
    "grad_gram",
    "grad_norms",
    "grad_stats",
]
