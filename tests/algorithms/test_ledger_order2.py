"""Second order keeps its books: over a whole AdamW run, what it predicts adds up to what the losses did."""

import argparse
from pathlib import Path

import pytest
import torch
from tiny_lm import TinyLM, next_byte_loss
from torch import nn

import ghostgram as gg

STEPS, WARM_UP, WINDOW, BATCH, HELD_OUT = 200, 20, 24, 8, 12


def windows():
    """(count, WINDOW) bytes of a module of the standard library, in a seeded order."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    text = text[: len(text) // WINDOW * WINDOW].view(-1, WINDOW)
    return text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]


def books(**options):
    """Measured and predicted change of two validation losses over STEPS steps of AdamW with clipping."""
    torch.manual_seed(0)
    text = windows()
    model = TinyLM(width=16, layers=1, heads=2, context=WINDOW)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARM_UP))
    sets = {
        name: lambda m, part=part: next_byte_loss(m, part)
        for name, part in zip("ab", text[: 2 * HELD_OUT].split(HELD_OUT), strict=True)
    }
    shapley = gg.InRunShapley(model, optimizer, sets, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids = torch.randint(2 * HELD_OUT, len(text), (BATCH,), generator=generator)
        with shapley.step(ids=ids):
            next_byte_loss(model, text[ids]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    ledger = shapley.ledger()
    return {
        name: {
            column: sum(row[column] for row in ledger.to_pylist() if row["set"] == name)
            for column in ("measured", "predicted", "residual", "sum_phi", "history")
        }
        for name in sets
    }


@pytest.fixture(scope="module")
def second_order():
    return books(order=2)


def test_total_over_two_hundred_adamw_steps_is_within_two_percent(second_order):
    for total in second_order.values():
        assert total["measured"] < -1  # nats: the model has learned
        assert total["sum_phi"] + total["history"] == pytest.approx(total["measured"], rel=0.02)


def test_first_order_over_the_same_run_is_further_off(second_order):
    first_order = books(order=1)
    for name, total in first_order.items():
        assert total["measured"] == pytest.approx(second_order[name]["measured"], rel=1e-2)  # the same training
        assert abs(total["residual"]) > 5 * abs(second_order[name]["residual"])
