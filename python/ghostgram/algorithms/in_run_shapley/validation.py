"""Losses and gradients of the validation sets at the current weights, leaving training as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Sets = Mapping[str, Callable[[nn.Module], Tensor]]


@contextmanager
def _undisturbed(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode inside; modes, random states and .grad outside exactly as before."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(p, p.grad) for p in parameters]
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, grad in grads:
                parameter.grad = grad


def validation_losses(model: nn.Module, sets: Sets) -> Tensor:
    """(K,) float64 losses, without gradients."""
    with _undisturbed(model, []), torch.no_grad():
        return torch.stack([_scalar(name, loss(model)).double().cpu() for name, loss in sets.items()])


def validation_gradients(
    model: nn.Module, sets: Sets, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, list[dict[nn.Parameter, Tensor]]]:
    """(K,) float64 losses, and for every set the gradient of its loss by parameter (zero where it has none)."""
    losses, gradients = [], []
    with _undisturbed(model, parameters), torch.enable_grad():
        for name, function in sets.items():
            for parameter in parameters:
                parameter.grad = None
            loss = _scalar(name, function(model))
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach().double().cpu())
            gradients.append({p: torch.zeros_like(p) if p.grad is None else p.grad for p in parameters})
    return torch.stack(losses), gradients


def _scalar(name: str, loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"validation[{name!r}]: expected a scalar loss tensor, got {what}")
    return loss
