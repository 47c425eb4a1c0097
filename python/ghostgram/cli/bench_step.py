"""What `ghostgram bench step` finds out: what In-Run Data Shapley adds to a whole training step, here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ghostgram import _C
from ghostgram.testing import roofline, turns

SYMBOLS, TOKENS, SAMPLES, HEADS = 256, 64, 8, 4
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "InRunShapley, order 1": {"order": 1},
    "InRunShapley, order 2": {"order": 2},
}


@dataclass(frozen=True)
class StepFindings:
    """All findings, ready for JSON."""

    processor: str
    isa: str
    threads: int
    layers: int
    width: int
    parameters: int
    samples: int
    tokens: int
    seconds: dict[str, float]
    """Way -> median seconds of a step: forward, backward and AdamW's step."""

    @property
    def over_plain(self) -> dict[str, float]:
        """Way -> its time over the plain step's."""
        return {way: seconds / self.seconds["plain"] for way, seconds in self.seconds.items()}

    def as_json(self) -> dict[str, Any]:
        """The findings as plain types."""
        return dataclasses.asdict(self) | {"over_plain": self.over_plain}


def examine(layers: int, width: int, seconds: float) -> StepFindings:
    """Times a step of a small Transformer over bytes, plain and valued, in alternating rounds.

    Args:
        layers: Of the Transformer.
        width: Of its residual stream, a multiple of its 4 heads.
        seconds: How long to time.
    """
    import torch

    torch.manual_seed(0)
    text, held_out = (torch.randint(SYMBOLS, (samples, TOKENS + 1)) for samples in (SAMPLES, 1))
    steps = {way: _step(layers, width, options, text, held_out) for way, options in WAYS.items()}
    _, model = steps["plain"]
    for step, _ in steps.values():  # Adam's first step has no second moment to go by
        step()
    return StepFindings(
        processor=roofline.processor(),
        isa=_C.isa(),
        threads=torch.get_num_threads(),
        layers=layers,
        width=width,
        parameters=sum(x.numel() for x in model.parameters()),
        samples=SAMPLES,
        tokens=TOKENS,
        seconds=turns.within(seconds, turns.wall, {way: step for way, (step, _) in steps.items()}),
    )


def _step(layers: int, width: int, options: dict[str, Any], text: Any, held_out: Any) -> tuple[Callable[[], None], Any]:
    """One trainee: its step, and its model."""
    import torch

    from ghostgram.algorithms.in_run_shapley import InRunShapley

    torch.manual_seed(0)
    model = _model(layers, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    shapley = InRunShapley(model, optimizer, partial(_loss, text=held_out), **options) if options else None

    def step() -> None:
        if shapley is None:
            _loss(model, text).backward()
        else:
            with shapley.step(ids=range(len(text))):
                _loss(model, text).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def _model(layers: int, width: int) -> Any:
    import torch
    from torch import nn

    class Transformer(nn.Module):
        """Bytes to the next byte's logits."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(SYMBOLS, width)
            self.position = nn.Embedding(TOKENS, width)
            layer = nn.TransformerEncoderLayer(width, HEADS, 4 * width, 0.0, batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            self.head = nn.Linear(width, SYMBOLS)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(TOKENS))

        def forward(self, symbols: torch.Tensor) -> torch.Tensor:
            places = torch.arange(symbols.shape[1]).expand_as(symbols)
            hidden = self.embedding(symbols) + self.position(places)
            return self.head(self.layers(hidden, mask=self.mask, is_causal=True))  # type: ignore[no-any-return]

    return Transformer()


def _loss(model: Any, text: Any) -> Any:
    from torch.nn import functional as F

    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
