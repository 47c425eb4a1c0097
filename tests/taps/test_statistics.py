"""Norms and dots of whole gradients are those of a separate backward for every sample, cross terms of uses included."""

import pytest
import torch
from torch import nn

from ghostgram.taps import conv
from ghostgram.taps.statistics import distinct, gradients_at, statistics, uses_of
from single_samples import B, trained
from taps.test_taps import D, V
from taps.test_uses import MODELS, SOME, PerPosition, build, close, kept_of, single_gradients, tolerance_of

CONVOLUTIONS = [name for name in MODELS if name.startswith("conv:")]
ALONE = [*SOME, *CONVOLUTIONS]


@pytest.mark.parametrize(
    ("name", "directed"),
    [*((name, "all") for name in MODELS), *((name, "none") for name in ALONE), (SOME[0], "the first")],
)
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


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_windows_that_do_not_fit_give_the_same_norms(name, monkeypatch):
    model, x = build(name, torch.float64)
    uses = uses_of(kept_of(model, x))
    whole = statistics(uses, {}, 0).squares
    monkeypatch.setattr(conv, "PIECE", 1)  # a line at a time
    assert close(statistics(uses, {}, 0).squares, whole, tolerance_of(name))


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


def test_distinct_ids_are_sorted_and_filled_up():
    ids = torch.tensor([[4, 4, 1, 9, 2], [7, 7, 7, 7, 0], [3, 3, 3, 3, 3]])
    counted = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert distinct(ids, 10, counted).tolist() == [[1, 4, 9], [7, 10, 10], [10, 10, 10]]


@pytest.mark.parametrize("name", [name for name in MODELS if "conv:" not in name])
def test_gradients_at_entries_are_those_of_single_samples(name):
    """Of every parameter, at entries that differ by sample and are not all there."""
    model, x = build(name, torch.float64)
    truth = single_gradients(model, x)
    for p, uses in uses_of(kept_of(model, x)).items():
        ids = torch.randint(0, len(p), (B, 4))
        entries = distinct(ids, len(p), torch.rand(B, 4) < 0.7)
        padded = torch.cat([truth[p], torch.zeros(B, 1, *p.shape[1:])], 1)
        wanted = torch.stack([gradient[mine] for gradient, mine in zip(padded, entries, strict=True)])
        assert (gradients_at(uses, entries) - wanted).norm() <= tolerance_of(name) * truth[p].norm()
