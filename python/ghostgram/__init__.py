"""Per-sample gradient statistics without per-sample gradients, and four data-selection methods on top of them."""

from importlib.metadata import version

from ghostgram.ops.grad_stats import GradStats, grad_stats

__version__ = version("ghostgram")

__all__ = ["GradStats", "grad_stats"]
