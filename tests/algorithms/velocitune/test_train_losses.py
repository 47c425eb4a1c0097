"""Training losses add up by domain, over micro-batches and processes, by sequence or by token."""

import pytest
import torch

from algorithms.ranks import on_ranks
from ghostgram.algorithms.velocitune.train_losses import TrainLosses


def reduced(rank, folder):
    sums = TrainLosses(3)
    sums.add(torch.tensor([rank, 2]), torch.tensor([1.5, 2.0 + rank]), torch.tensor([3, 4]))
    return sums.reduce()


def test_by_sequence_and_by_token():
    g = torch.Generator().manual_seed(0)
    ids, losses = torch.randint(0, 4, (6, 9), generator=g), torch.rand(6, 9, generator=g, requires_grad=True)
    counts = torch.rand(6, 9, generator=g) < 0.7
    sums = TrainLosses(5)
    for rows in (slice(0, 2), slice(2, 6)):
        sums.add(ids[rows], losses[rows] * counts[rows], counts[rows])
    found = sums.reduce()
    for k in range(5):
        here = (ids == k) & counts
        assert found.losses[k] == pytest.approx(float(losses.detach().double()[here].sum()), rel=1e-14)
        assert found.tokens[k] == here.sum()
    with pytest.raises(RuntimeError, match="at least one micro-batch"):
        sums.reduce()


def test_over_processes(tmp_path):
    for found in on_ranks(2, reduced, tmp_path):
        assert found.losses.tolist() == [1.5, 1.5, 5.0]
        assert found.tokens.tolist() == [3, 3, 8]


def test_what_cannot_be_added_is_named():
    sums = TrainLosses(2)
    with pytest.raises(ValueError, match="expected equal shapes"):
        sums.add(torch.zeros(2, dtype=torch.int64), torch.zeros(3), torch.zeros(3))
    sums.add(torch.zeros(1, dtype=torch.int64), torch.tensor([float("nan")]), torch.ones(1))
    with pytest.raises(FloatingPointError, match="expected finite sums"):
        sums.reduce()
