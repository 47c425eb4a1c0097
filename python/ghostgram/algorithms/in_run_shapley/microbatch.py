"""One backward of a step: whose samples it scores, and how their dots are taken when the directions come later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ghostgram.taps import Taps
from ghostgram.taps.uses import Kept
from ghostgram.training.aside import RandomStates, gradients_aside
from ghostgram.training.gathered import gathered
from ghostgram.training.oracle import directional_derivatives

Losses = Callable[[], Tensor]
Directions = Mapping[nn.Parameter, Tensor]
Dots = dict[nn.Parameter, Tensor]


@dataclass
class Microbatch:
    """One backward of a step."""

    ids: list[int]
    """Of its samples, or of its documents where there are segments."""
    losses: Losses | None = None
    """Computes again the loss that backward was called on."""
    segments: Tensor | None = None
    """(B, T): which of `ids` each position belongs to; negative for none."""
    way: str = "early"
    """How dots are taken: early, stored, replay or forward."""
    states: RandomStates | None = None
    """Before the forward."""
    dots: Dots = field(default_factory=dict)
    joint: Tensor | None = None
    """(rows, K) dots of all the parameters together that no tap covers."""
    oracle: Tensor | None = None
    """(rows, K) audited dots of all parameters together."""
    kept: Kept = field(default_factory=list)
    weights: Tensor | None = None
    """(rows,) what each row's gradient was multiplied by, where an online selection has chosen; dots are without it."""
    ranks: int = 1
    """Processes over which gradients are averaged: dots are divided by it."""

    @property
    def batch(self) -> int:
        """The first dimension of every layer's input."""
        return len(self.ids) if self.segments is None else self.segments.shape[0]

    @property
    def weighted_dots(self) -> Dots:
        """The dots of the rows' shares of .grad, on the CPU."""
        if self.weights is None:
            return self.dots
        return {p: self.weights[:, None] * d for p, d in self.dots.items()}

    @contextmanager
    def scored(self, taps: Taps, directions: Directions | None, gradients: bool = True) -> Iterator[None]:
        """The backward inside is scored; without directions it is kept for later."""
        with taps.samples(self.batch, directions, segments=self.segments, documents=len(self.ids), gradients=gradients):
            yield
        self.dots, self.kept = taps.dots() if directions is not None else {}, taps.kept()

    def replayed(self, taps: Taps, directions: Directions, trained: Sequence[nn.Parameter]) -> None:
        """Takes dots by a second forward and backward with the first one's random states, for scores alone."""
        assert self.losses is not None
        assert self.states is not None
        with (
            gradients_aside(trained),
            self.states.again(),
            torch.enable_grad(),
            self.scored(taps, directions, gradients=False),
        ):
            self.losses().sum().backward()  # type: ignore[no-untyped-call]

    def derivatives(self, model: nn.Module, directions: Directions) -> Tensor:
        """(rows, K) derivatives of every sample's share of the loss along the directions, by forward mode."""
        if self.losses is None:
            raise ValueError(
                "losses: expected a callable that gives every sample's share of the loss, (B,), for late='forward', "
                "fallback='jvp' and audits; got None"
            )
        assert self.states is not None
        with self.states.again():
            derivatives = directional_derivatives(model, self.losses, directions)
        if derivatives.shape[0] != len(self.ids):
            raise ValueError(
                f"losses: expected one share of the loss for each of the {len(self.ids)} ids, got "
                f"{derivatives.shape[0]}"
            )
        return derivatives / self.ranks

    def fetch(self) -> None:
        """Brings the dots to the CPU, in float64."""
        self.dots = dict(zip(self.dots, gathered(self.dots.values()) / self.ranks, strict=True))
