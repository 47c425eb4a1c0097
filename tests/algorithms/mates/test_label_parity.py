"""First-order labels of a trained model rank documents as real updates do, better than a plain product of gradients."""

import pytest
import torch
from tiny_lm import TinyLM
from torch import nn

from algorithms.mates.models import TASK, bytes_of, documents, reference
from ghostgram.algorithms.mates.labels.exact import ExactLabels
from ghostgram.algorithms.mates.labels.first_order import AdamLabels, DotsLabels
from ghostgram.algorithms.mates.labels.forward import JvpLabels
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.stats import spearman

STEPS, BATCH, DOCUMENTS, EXAMPLES = 250, 16, 384, 48


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_labels_rank_as_real_updates_do(seed):
    torch.manual_seed(seed)
    model = TinyLM(width=32, layers=1, heads=2, context=24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    ids, mask = bytes_of(documents(STEPS * BATCH, 100 + seed))
    for some in zip(ids.split(BATCH), mask.split(BATCH), strict=True):
        TASK.losses(model, *some).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    view = OptimizerView(model, optimizer, clip=1.0)
    references, pool = [reference(EXAMPLES, 200 + seed)], bytes_of(documents(DOCUMENTS, 300 + seed))

    def labels(kind, **settings):
        backend = kind(model, view, references, TASK, **settings)
        backend.prepare()
        return backend.influence(*pool)

    exact = labels(ExactLabels, batch=EXAMPLES)
    along = references[0].gradient(model, TASK)
    plain = []
    for i in range(DOCUMENTS):
        grads = torch.autograd.grad(TASK.losses(model, *(x[i : i + 1] for x in pool)).sum(), list(along))
        plain.append(float(sum((a * g).sum() for a, g in zip(along.values(), grads, strict=True))))
    rho = {
        kind: spearman(labels(kind).values[:, 0], exact.values[:, 0]) for kind in (AdamLabels, DotsLabels, JvpLabels)
    }
    of_gradients = spearman(plain, exact.values[:, 0])
    print({kind.__name__: round(value, 4) for kind, value in rho.items()}, round(of_gradients, 4))
    assert rho[AdamLabels] >= 0.97
    assert rho[DotsLabels] >= 0.96
    assert rho[JvpLabels] >= 0.95
    assert min(rho.values()) > spearman(plain, exact.values[:, 0]) + 0.02
