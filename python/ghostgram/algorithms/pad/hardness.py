"""How hard a model finds each image of a batch, by the rules that `scores.score` averages over models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostgram.ops.softmax_stats import softmax_stats
from ghostgram.taps import Taps, cover
from ghostgram.taps.statistics import statistics, uses_of

Measure = Callable[[Tensor, Tensor], Tensor]
"""Images (B, ...) and labels (B,) -> (B,) how hard each is: of each image alone, whatever the batch."""


def _of_logits(rule: Callable[[Tensor, Tensor], Tensor], model: nn.Module) -> Measure:
    return torch.no_grad()(lambda x, y: rule(model(x), y))


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{c != y} z_c - z_y."""
    own = labels[:, None]
    return (logits.scatter(1, own, -torch.inf).amax(1, keepdim=True) - logits.gather(1, own))[:, 0]


def _gradient_norm(model: nn.Module) -> Measure:
    """|| g_i ||_2 over all trainable parameters, from one backward of the sum: no per-sample gradient is stored."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    taps = Taps(cover(model, parameters), parameters)

    def measure(x: Tensor, y: Tensor) -> Tensor:
        with taps.samples(len(x), None, gradients="later"):
            F.cross_entropy(model(x), y, reduction="sum").backward()  # type: ignore[no-untyped-call]
        return statistics(uses_of(taps.kept()), {}, 0).squares.sqrt()

    return measure


def _last_layer_norm(model: nn.Module) -> Measure:
    """|| p - y ||_2 sqrt(|| h ||^2 + 1): that of the gradient of the last layer, with h its input, and 1 its bias's."""

    @torch.no_grad()
    def measure(x: Tensor, y: Tensor) -> Tensor:
        with _calls(model) as calls:
            logits = model(x)
        own = [(layer, h) for layer, h, out in calls if out is logits]
        if not own:
            raise ValueError("grand_last: expected a model whose logits are what an nn.Linear returns")
        layer, h = own[0]
        norms: Tensor = softmax_stats(logits, y).el2n * (h.square().sum(1) + (layer.bias is not None)).sqrt()
        return norms

    return measure


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[tuple[nn.Linear, Tensor, Tensor]]]:
    """Collects the linear layers that are called inside, with what they are given and what they return."""
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        assert isinstance(layer, nn.Linear)
        calls.append((layer, inputs[0], output))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


MEASURES: dict[str, Callable[[nn.Module], Measure]] = {
    "el2n": partial(_of_logits, lambda logits, labels: softmax_stats(logits, labels).el2n),
    "grand": _gradient_norm,
    "grand_last": _last_layer_norm,
    "loss": partial(_of_logits, lambda logits, labels: softmax_stats(logits, labels).loss),
    "margin": partial(_of_logits, _margin),
    "entropy": partial(_of_logits, lambda logits, labels: softmax_stats(logits, labels).entropy),
}
"""By name, what makes a measure of a model in eval mode."""


def forgotten(correct: Tensor) -> Tensor:
    """How often each image went from right to wrong.

    Args:
        correct: (epochs, n) bool, whether the model was right about it after each epoch.

    Returns:
        (n,) float64; for an image that was never right, the number of epochs: it is the hardest, though nothing of it
        was there to be forgotten.
    """
    times = (correct[:-1] & ~correct[1:]).sum(0)
    return times.where(correct.any(0), len(correct)).double()
