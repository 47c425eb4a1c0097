"""Norms and dots of whole gradients are those of a separate backward for every sample, cross terms of uses included."""

import pytest
import torch
from torch import nn

from ghostgram.taps.statistics import statistics, uses_of
from single_samples import B, trained
from taps.test_taps import D, V
from taps.test_uses import MODELS, PerPosition, build, close, kept_of, single_gradients, tolerance_of


@pytest.mark.parametrize("directed", ["all", "none", "the first"])
@pytest.mark.parametrize("name", MODELS)
def test_norms_and_dots_are_those_of_single_samples(name, directed):
    model, x = build(name, torch.float64)
    truth = single_gradients(model, x)
    some = {"all": trained(model), "none": [], "the first": trained(model)[:1]}[directed]
    directions = {p: torch.randn(3, *p.shape, dtype=p.dtype) for p in some}
    dots = sum((truth[p].flatten(1) @ directions[p].flatten(1).T for p in some), start=torch.zeros(B, 3))
    squares = sum(each.flatten(1).square().sum(1) for each in truth.values())
    ours = statistics(uses_of(kept_of(model, x)), directions, 3)
    assert close(ours.squares, squares, tolerance_of(name))
    assert close(ours.dots, dots, tolerance_of(name)) if some else not ours.dots.any()


class TiedBothWays(nn.Module):
    """A table looked up with a padding row and without, multiplied with twice."""

    def __init__(self):
        super().__init__()
        self.tok, self.other, self.head = nn.Embedding(V, D, padding_idx=3), nn.Embedding(V, D), nn.Linear(D, V)
        self.head.weight = self.other.weight = self.tok.weight

    def forward(self, ids):
        x = self.tok(ids) * torch.tanh(self.other(ids.roll(1, 1))) + self.tok(ids.roll(2, 1))
        return self.head(torch.tanh(x)) + self.head(x)


class Looked(PerPosition):
    """One lookup with a padding row and one product."""

    def forward(self, ids):
        return super().forward(torch.where(ids % 3 == 0, 3, ids)).roll(1, 1)


@pytest.mark.parametrize("kind", [TiedBothWays, Looked])
def test_a_tied_table_keeps_the_cross_terms_and_its_padding_row(kind):
    torch.manual_seed(0)
    model, ids = kind().double(), torch.randint(0, V, (B, 7))
    truth = single_gradients(model, ids)
    squares = sum(each.flatten(1).square().sum(1) for each in truth.values())
    assert close(statistics(uses_of(kept_of(model, ids)), {}, 0).squares, squares, 1e-10)


def test_documents_are_refused():
    model, ids = PerPosition(), torch.randint(0, V, (B, 7))
    kept = kept_of(model, ids)
    packed = [(p, type(use)(**{**vars(use), "segments": ids})) for p, use in kept if hasattr(use, "segments")]
    with pytest.raises(ValueError, match="statistics: expected rows that are samples, got documents"):
        uses_of(packed)
