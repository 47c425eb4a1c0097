"""Passes beside the training's own, which find the model and leave it as training has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ghostgram.taps.sharding import local


@contextmanager
def evaluating(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode inside; modes, random states and .grad outside exactly as before."""
    modes = [(module, module.training) for module in model.modules()]
    with gradients_aside(parameters), random_states_kept(model):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def gradients_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """.grad is None inside, and outside exactly as before."""
    grads = [(p, p.grad) for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad


def taken_gradients(parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """The gradients that a backward has left, zero where it has left none; .grad is None afterwards.

    Of sharded parameters, the parts that this process holds.
    """
    grads = {p: p.grad for p in parameters}
    for p in parameters:
        p.grad = None
    return {p: torch.zeros_like(local(p)) if g is None else local(g) for p, g in grads.items()}


def random_states_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Leaves the random states of the CPU and of a model's GPUs as they are now."""
    return torch.random.fork_rng(sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}))


class RandomStates:
    """The random states of the CPU and of a model's GPUs at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._cpu = torch.get_rng_state()
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._gpus = {device: torch.cuda.get_rng_state(device) for device in devices}

    @contextmanager
    def again(self) -> Iterator[None]:
        """That moment's states inside; outside what they are now."""
        with random_states_kept(self._model):
            self.put_back()
            yield

    def put_back(self) -> None:
        """Makes that moment's states the current ones."""
        torch.set_rng_state(self._cpu)
        for device, state in self._gpus.items():
            torch.cuda.set_rng_state(state, device)
