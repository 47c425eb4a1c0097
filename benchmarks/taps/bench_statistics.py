"""Norms and dots of whole per-sample gradients, from what a backward kept; beside dots alone, and gradients by vmap."""

from __future__ import annotations

import pytest
import torch
from interleave import interleaved
from tiny_lm import BYTES, TinyLM, next_byte_loss
from torch import Tensor
from torch.func import functional_call, grad, vmap

from ghostgram.taps import Taps, cover
from ghostgram.taps.statistics import statistics, uses_of

MODELS = {  # width, layers, heads, samples, tokens of each; the table is tied to the output layer
    "width 64": (64, 2, 4, 32, 64),
    "width 256": (256, 2, 4, 16, 64),
}


class Scored:
    """A model, samples, and a direction."""

    def __init__(self, width: int, layers: int, heads: int, samples: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.model, self.samples = TinyLM(width, layers, heads, tokens), samples
        self.text = torch.randint(BYTES, (samples, tokens + 1))
        self.named = dict(self.model.named_parameters())
        self.directions = {p: torch.randn(1, *p.shape) for p in self.named.values()}
        self.taps = Taps(cover(self.model, self.named.values()), list(self.named.values()))

    def plain(self) -> None:
        self.model.zero_grad()
        next_byte_loss(self.model, self.text).backward()

    def dots(self) -> None:
        with self.taps.samples(self.samples, self.directions, gradients=False):
            (self.samples * next_byte_loss(self.model, self.text)).backward()

    def norms_and_dots(self) -> tuple[Tensor, Tensor]:
        with self.taps.samples(self.samples, None, gradients="later"):
            (self.samples * next_byte_loss(self.model, self.text)).backward()
        squares, dots = statistics(uses_of(self.taps.kept()), self.directions, 1)
        return squares.sqrt(), dots[:, 0]

    def formed(self) -> tuple[Tensor, Tensor]:
        def loss(weights: dict[str, Tensor], text: Tensor) -> Tensor:
            return next_byte_loss(lambda ids: functional_call(self.model, weights, (ids,)), text[None])

        each = vmap(grad(loss), in_dims=(None, 0))({n: p.detach() for n, p in self.named.items()}, self.text)
        squares = sum(g.flatten(1).square().sum(1) for g in each.values())
        return squares.sqrt(), sum(g.flatten(1) @ self.directions[self.named[n]].flatten() for n, g in each.items())


@pytest.mark.parametrize("name", MODELS)
def bench_statistics(benchmark, record, name):
    scored = Scored(*MODELS[name])
    for ours, truth in zip(scored.norms_and_dots(), scored.formed(), strict=True):
        torch.testing.assert_close(ours, truth.double(), rtol=1e-4, atol=1e-4 * float(truth.norm()))
    rivals = {"plain": scored.plain, "dots": scored.dots, "formed": scored.formed}
    seconds = interleaved(benchmark, scored.norms_and_dots, rivals, rounds=7, cold=False)
    over_plain = {f"{way}_over_plain": took / seconds["plain"] for way, took in seconds.items() if way != "plain"}
    record(model=name, plain_ms=1e3 * seconds["plain"], **over_plain)
