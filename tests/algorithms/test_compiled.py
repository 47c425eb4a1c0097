"""The engine with a compiled model: wrapped by torch.compile or compiled in place."""

import numpy as np
import pytest
import torch

import ghostgram as gg
from algorithms.models import BATCH, language_model, lm_loss, phis, sentences


@pytest.mark.parametrize(("order", "in_place"), [(1, False), (2, True)], ids=["1, wrapped", "2, in place"])
def test_values_are_those_of_the_eager_model(order, in_place):
    torch._dynamo.reset()
    found, ids = [], sentences(BATCH, 1)
    for compiled in (False, True):
        model = language_model("gpt2 tied", torch.float64)
        if compiled and in_place:
            model.compile(backend="aot_eager")
        elif compiled:
            model = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        shapley = gg.InRunShapley(model, optimizer, lambda m: lm_loss(m, sentences(3, 2)), order)
        for _ in range(2):  # Adam's first step takes its dots late
            with shapley.step(ids=range(BATCH)):
                lm_loss(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(phis(shapley))
        assert "transformer.wte.weight" in shapley.coverage().scored
    np.testing.assert_allclose(*found, rtol=1e-9)
