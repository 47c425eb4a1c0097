"""Documents packed into rows: a document is a sample, exactly where attention is masked by document."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghostgram as gg
from algorithms.models import phis

V, D, T = 19, 8, 12
LENGTHS = [[5, 4, 3], [7, 3]]  # of two rows; the second one ends in two positions of no document


class Masked(nn.Module):
    """A causal block whose attention stays within a document (or not) and whose positions start again in each."""

    def __init__(self, masked=True):
        super().__init__()
        torch.manual_seed(0)
        self.masked = masked
        self.tok, self.pos, self.norm, self.rms = nn.Embedding(V, D), nn.Embedding(T, D), nn.LayerNorm(D), nn.RMSNorm(D)
        self.qkv, self.out, self.head = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, V, bias=False)
        self.double()

    def forward(self, ids, segments):
        starts = torch.stack([torch.cat([torch.arange(int((row == s).sum())) for s in row.unique_consecutive()])
                              for row in segments])  # fmt: skip
        x = self.tok(ids) + self.pos(starts)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if self.masked:
            allowed = allowed & (segments[:, :, None] == segments[:, None, :])
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))
        return self.head(self.rms(x))


def packed():
    ids = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(1))
    segments, labels, number = torch.full((2, T), -1), torch.full((2, T), -100), 0
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            segments[row, start : start + length] = number
            # The last position of a document predicts nothing: its target would be another document's.
            labels[row, start : start + length - 1] = ids[row, start + 1 : start + length]
            start, number = start + length, number + 1
    return ids, segments, labels


def loss(model, ids, segments, labels):
    logits = model(ids, segments)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 17


@pytest.mark.parametrize("order", [1, 2])
def test_a_packed_document_is_worth_what_it_is_in_a_row_of_its_own(order):
    ids, segments, labels = packed()
    found = []
    for alone in (False, True):
        model = Masked()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        shapley = gg.InRunShapley(
            model, optimizer, lambda m: loss(m, ids.flip(1), segments * 0, ids), order=order, doc_mask=True
        )
        if alone:
            with shapley.step():
                for d in range(5):
                    here = segments == d
                    with shapley.samples([100 + d]):
                        loss(model, ids[here][None], segments[here][None], labels[here][None]).backward()
        else:
            with shapley.step(ids=100 + torch.arange(5), segments=segments):
                loss(model, ids, segments, labels).backward()
        optimizer.step()
        found.append(phis(shapley)[:, 0])
        assert shapley.step_log()["sample_id"].to_pylist() == list(range(100, 105))
        assert shapley.step_log().schema.metadata[b"documents"] == b"exact"
    np.testing.assert_allclose(*found, rtol=1e-9)


def test_without_a_mask_by_document_values_are_by_position():
    """They hold what later documents lose by looking back, and the log says so."""
    ids, segments, labels = packed()
    found = {}
    for masked in (True, False):
        model = Masked(masked)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        shapley = gg.InRunShapley(model, optimizer, lambda m: loss(m, ids.flip(1), segments * 0, ids))
        with shapley.step(ids=range(5), segments=segments):
            loss(model, ids, segments, labels).backward()
        optimizer.step()
        found[masked] = phis(shapley)[:, 0]
        assert shapley.step_log().schema.metadata[b"documents"] == b"by position"
    assert np.abs(found[True] - found[False]).max() > 1e-3 * np.abs(found[True]).max()


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (torch.zeros(2, T), r"segments: expected \(B, T\) integers, got torch.float32"),
        (torch.zeros(T, dtype=torch.long), r"segments: expected \(B, T\) integers"),
        (torch.full((2, T), 5), "segments: expected numbers below 5, one for each of ids, got 5"),
    ],
)
def test_bad_segments(segments, message):
    model = Masked()
    shapley = gg.InRunShapley(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m: m.head.weight.sum())
    with pytest.raises(ValueError, match=message):
        with shapley.step(ids=range(5), segments=segments):
            pass


def test_a_layer_without_positions_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(T, 2))
    shapley = gg.InRunShapley(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m: m[1].weight.sum())
    with pytest.raises(ValueError, match="packed documents need an input"):
        with shapley.step(ids=range(5), segments=packed()[1]):
            model(torch.ones(2, T)).sum().backward()
