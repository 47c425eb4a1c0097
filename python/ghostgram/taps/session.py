"""The taps of one model: on while a step is scored, gone from the model in between."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ghostgram.taps.coverage import Coverage

Contraction = Callable[[Tensor], Tensor]
"""From directions (K, *parameter shape) to the dots (B, K) of every sample's gradient with them."""


class Taps:
    """Per-sample dots `<g_i, D_k>` of every covered parameter, taken where its gradient is computed anyway.

    While `samples` is open, the `forward` of each covered module is replaced by one whose backward also contracts.
    Dots are accumulated per *parameter*: a weight used twice, or tied between two modules, adds up, which is exact
    because the dot is linear in the gradient.

    Args:
        coverage: Which modules to tap, from `cover`.
        dots_needed: The parameters to score; the other parameters of tapped modules get their gradient alone.
    """

    def __init__(self, coverage: Coverage, dots_needed: Sequence[nn.Parameter]) -> None:
        self._modules = coverage.tapped
        self._scored = set(dots_needed)
        self._directions: Mapping[nn.Parameter, Tensor] | None = None
        self._batch = 0
        self._open = False
        self._dots: dict[nn.Parameter, Tensor] = {}
        self._late: list[tuple[nn.Parameter, Contraction]] = []
        self.rounded: set[nn.Parameter] = set()
        """Parameters whose gradient passed through a 16-bit dtype."""

    @contextmanager
    def samples(self, batch: int, directions: Mapping[nn.Parameter, Tensor] | None) -> Iterator[None]:
        """Scores the backward passes inside, whose layer inputs have `batch` samples in their first dimension.

        Args:
            batch: The number of samples B.
            directions: parameter -> (K, *shape), in the parameter's accumulation dtype. None when they are not known
                yet: every layer's (a, b) is then kept until `contract`.
        """
        self._batch, self._directions, self._open = batch, directions, True
        self._dots, self._late = {}, []
        try:
            for module, forward in self._modules:
                module._ghostgram_taps = self  # type: ignore[assignment]
                module.forward = types.MethodType(forward, module)
            yield
        finally:
            self._open, self._directions = False, None  # directions are as large as the model: let them go
            for module, _ in self._modules:
                del module.forward, module._ghostgram_taps

    def dots(self) -> dict[nn.Parameter, Tensor]:
        """parameter -> (B, K) of the last `samples`; a parameter that no backward reached is absent."""
        return self._dots

    def kept(self) -> list[tuple[nn.Parameter, Contraction]]:
        """Hands over what the last `samples` kept for want of directions; see `contract`."""
        kept, self._late = self._late, []
        return kept

    @staticmethod
    def contract(
        kept: list[tuple[nn.Parameter, Contraction]], directions: Mapping[nn.Parameter, Tensor]
    ) -> dict[nn.Parameter, Tensor]:
        """The dots of layers kept by a `samples` without directions."""
        dots: dict[nn.Parameter, Tensor] = {}
        for parameter, contraction in kept:
            _accumulate(dots, parameter, contraction(directions[parameter]))
        return dots

    # What tapped layers call. -------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """The number of samples of the open step."""
        return self._batch

    def check_samples(self, x: Tensor, layer: str) -> None:
        """Raises unless the first dimension of a layer's input is the sample."""
        if x.dim() < 2 or x.shape[0] != self._batch:
            raise ValueError(
                f"{layer}: expected an input whose first dimension is the sample ({self._batch}), got {tuple(x.shape)}"
            )

    def directions(self, parameter: nn.Parameter | None) -> Tensor | None:
        """The directions to contract with right now: None when the parameter is not scored, or they come later."""
        if parameter not in self._scored:
            return None
        if not self._open:
            raise RuntimeError(
                "backward ran after its scoring step was closed: call it inside `with shapley.step(...)`"
            )
        return None if self._directions is None else self._directions.get(parameter)

    def add(self, parameter: nn.Parameter, grad: Tensor, dots: Tensor | None, later: Contraction) -> None:
        """Books one use of a parameter: its dots if they could be taken, else the contraction that will take them.

        `grad` is the gradient at the layer's output, whose dtype tells how exactly the use's `.grad` is kept.
        """
        if parameter not in self._scored:
            return
        if grad.dtype.itemsize == 2:
            self.rounded.add(parameter)
        if self._directions is None:
            self._late.append((parameter, later))
        elif dots is not None:
            _accumulate(self._dots, parameter, dots)


def _accumulate(dots: dict[nn.Parameter, Tensor], parameter: nn.Parameter, more: Tensor) -> None:
    if parameter in dots:
        dots[parameter] += more
    else:
        dots[parameter] = more


def taps_of(module: nn.Module) -> Taps:
    """The taps that a tapped forward belongs to."""
    return module._ghostgram_taps  # type: ignore[return-value]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would run a matrix product on x in, or None outside autocast."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)
