"""Training on the best 16 of 32 samples: chosen in the one pass, or in a pass of its own before the training one.

Forward and backward alone: the validation pass, the optimizer and the log are the same for either way. `whole` is all
of a step of the engine but the optimizer's own, with a validation window to every sixteen candidates.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from interleave import interleaved
from tiny_lm import BYTES, TinyLM, next_byte_loss

import ghostgram as gg
from ghostgram.algorithms.in_run_shapley.select import greedy, top_k
from ghostgram.taps import Taps, cover
from ghostgram.taps.uses import accumulate, gram

SAMPLES, KEPT, VALIDATION = 32, 16, 2
MODELS = {  # width, layers, heads, tokens of a sample
    "width 256": (256, 4, 4, 128),
    "width 768": (768, 2, 12, 64),
}


class Trainer:
    """A model, candidates to train it on, and a direction to score them by."""

    def __init__(self, width: int, layers: int, heads: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.model = TinyLM(width, layers, heads, tokens)
        self.text, held_out = torch.randint(BYTES, (SAMPLES + VALIDATION, tokens + 1)).split([SAMPLES, VALIDATION])
        coverage = cover(self.model, self.model.parameters())
        self.taps = Taps(coverage, list(coverage.scored.values()))
        self.validation = partial(next_byte_loss, text=held_out)
        self.validation(self.model).backward()
        self.directions = {p: p.grad[None].clone() for p in self.model.parameters()}
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.shapley = gg.InRunShapley(self.model, optimizer, self.validation)

    def plain(self, text: torch.Tensor) -> None:
        self.model.zero_grad()
        next_byte_loss(self.model, text).backward()

    def validate(self) -> None:
        torch.autograd.grad(self.validation(self.model), list(self.model.parameters()))

    def best(self) -> torch.Tensor:
        return top_k(torch.stack(list(self.taps.dots().values())).sum(0)[:, 0], KEPT)

    def two_passes(self) -> None:
        with self.taps.samples(SAMPLES, self.directions, gradients=False):
            next_byte_loss(self.model, self.text).backward()
        self.plain(self.text[self.best()])

    def one_pass(self, with_gram: bool = False) -> None:
        self.model.zero_grad()
        with self.taps.samples(SAMPLES, self.directions, gradients="later"):
            next_byte_loss(self.model, self.text).backward()
        kept, rows = self.taps.kept(), self.best()
        if with_gram:
            values = torch.stack(list(self.taps.dots().values())).sum(0)[:, 0].double()
            rows = greedy(values, gram(kept, lambda _: 1.0), KEPT, 1.0)
        weights = torch.zeros(SAMPLES)
        weights[rows] = SAMPLES / KEPT
        accumulate(kept, weights)

    def whole(self) -> None:
        self.model.zero_grad()
        with self.shapley.select(range(SAMPLES), KEPT):
            next_byte_loss(self.model, self.text).backward()


@pytest.mark.parametrize("name", MODELS)
def bench_step(benchmark, record, name):
    trainer = Trainer(*MODELS[name])
    trainer.two_passes()
    truth = [p.grad for p in trainer.model.parameters()]
    trainer.one_pass()
    for p, expected in zip(trainer.model.parameters(), truth, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)
    ways = {
        "two_passes": trainer.two_passes,
        "plain_32": partial(trainer.plain, trainer.text),
        "plain_16": partial(trainer.plain, trainer.text[:KEPT]),
        "validation": trainer.validate,
        "greedy": partial(trainer.one_pass, with_gram=True),
        "whole": trainer.whole,
    }
    seconds = interleaved(benchmark, trainer.one_pass, ways, rounds=7, cold=False)
    plain = seconds.pop("plain_32")
    record(model=name, plain_32_ms=1e3 * plain, two_over_one=seconds["two_passes"] / seconds["ours"],
           **{f"{way}_over_plain": took / plain for way, took in seconds.items()})  # fmt: skip
