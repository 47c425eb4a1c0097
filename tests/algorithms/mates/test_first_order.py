"""First-order labels agree with materialised gradients to rounding, with each other, and with real steps in rank."""

import copy

import pytest
import torch
from mates.models import TASK, bytes_of, documents, reference, trained
from tiny_lm import TinyLM
from torch import nn
from torch.utils.checkpoint import checkpoint

from ghostgram.algorithms.mates.exact import ExactLabels
from ghostgram.algorithms.mates.expansion import vocabulary
from ghostgram.algorithms.mates.first_order import AdamLabels, DotsLabels
from ghostgram.algorithms.mates.forward import DifferenceLabels, JvpLabels
from ghostgram.algorithms.mates.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.stats import spearman
from ghostgram.training.oracle import central_difference

CLIP = 1.0


class Untied(TinyLM):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.head = nn.Linear(self.token.embedding_dim, self.token.num_embeddings)


class Reused(TinyLM):
    """Its one block twice, its table tied."""

    def forward(self, text):
        x = self.token(text) + self.position(torch.arange(text.shape[1]))
        return self.head(self.norm(self.blocks[0](self.blocks[0](x))))


class Checkpointed(TinyLM):
    def forward(self, text):
        x = self.token(text) + self.position(torch.arange(text.shape[1]))
        return self.head(self.norm(checkpoint(self.blocks[0], x, use_reentrant=False)))


class LowRank(nn.Module):
    """A frozen layer and what is learnt beside it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 3, bias=False)
        self.up = nn.Linear(3, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Adapted(TinyLM):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.requires_grad_(False)
        self.blocks[0].qkv, self.blocks[0].up = LowRank(self.blocks[0].qkv), LowRank(self.blocks[0].up)
        for name in ("qkv", "up"):
            self.blocks[0].get_submodule(name).layer.requires_grad_(False)


KINDS = [TinyLM, Untied, Reused, Checkpointed, Adapted]
DOCUMENTS = bytes_of(documents(11, 7))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def probed(request):
    """(view, references, single gradients by document, references' gradients at theta_null), in float64."""
    model, optimizer = trained(build=request.param)
    view = OptimizerView(model, optimizer, clip=CLIP)
    references = [reference(), reference(5, 2, "other")]
    ids, mask = DOCUMENTS
    single = []
    for i in range(len(ids)):
        TASK.losses(model, ids[i : i + 1], mask[i : i + 1]).sum().backward()
        single.append({p: torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in view.names})
        model.zero_grad()
    with view.at_null():
        along = [r.gradient(model, TASK) for r in references]
    return view, references, single, along


def influence(backend):
    assert backend.why_not() is None
    backend.prepare()
    return backend.influence(*DOCUMENTS)


def norms_of(single):
    return torch.stack([torch.cat([g.flatten() for g in each.values()]).norm() for each in single])


def along_steps(view, single, along, step, clipped=True):
    """(n, R) of -<grad L_r, step(p, g)>, summed over parameters, g clipped."""
    clips = view.clip_factors(norms_of(single)) if clipped else torch.ones(len(single))
    return -torch.stack([
        torch.stack([sum((r[p] * step(p, c * g)).sum() for p, g in each.items()) for r in along])
        for each, c in zip(single, clips, strict=True)
    ])  # fmt: skip


def close(ours, truth, tolerance):
    return (ours - truth).norm() <= tolerance * truth.norm()


def without_null_gain(backend):
    return influence(backend).values - backend.null_gain


def test_jvp_is_the_product_with_materialised_gradients(probed):
    view, references, single, along = probed
    truth = along_steps(view, single, along, lambda p, g: -view.slope(p) * g, clipped=False)
    backend = JvpLabels(view.model, view, references, TASK, capped=False)
    assert close(without_null_gain(backend), truth, 1e-12)


def test_dots_are_jvp_with_clipping(probed):
    view, references, single, _ = probed
    jvp = without_null_gain(JvpLabels(view.model, view, references, TASK))
    dots = DotsLabels(view.model, view, references, TASK, vocab="frozen")
    found = influence(dots)
    assert close(found.norms, norms_of(single), 1e-12)
    assert (found.clip < 1).any()
    assert close(found.values - dots.null_gain, found.clip[:, None] * jvp, 1e-11)
    assert close(found.own_loss, TASK.losses(view.model, *DOCUMENTS).detach(), 1e-12)


def test_adam_is_the_product_with_materialised_steps(probed):
    view, references, single, along = probed
    backend = AdamLabels(view.model, view, references, TASK)
    assert close(without_null_gain(backend), along_steps(view, single, along, view.delta), 1e-11)


def test_rows_of_own_tokens_take_the_step_as_it_is(probed):
    view, references, single, along = probed
    special = vocabulary(view, TASK, references[0])
    names = {view.names[p] for p in special}
    assert names == {TinyLM: {"token.weight"}, Untied: {"token.weight", "head.weight", "head.bias"}, Adapted: set()}.get(
        type(view.model), {"token.weight"}
    )
    ids, mask = DOCUMENTS
    each = iter(ids[i, : int(mask[i].nonzero().max()) + 1].unique() for i in range(len(ids)))
    tokens = {}

    def step(p, g):
        if p not in special:
            return -view.slope(p) * g
        own = tokens[id(g)] if id(g) in tokens else tokens["now"]
        return torch.where(own.view(-1, *(1,) * (g.dim() - 1)), view.delta(p, g), -view.slope(p) * g)

    rows = []
    for one in single:
        own = torch.zeros(256, dtype=torch.bool)
        own[next(each)] = True
        tokens["now"] = own
        rows.append(along_steps(view, [one], along, step))
    backend = DotsLabels(view.model, view, references, TASK, capped=False)
    assert close(without_null_gain(backend), torch.cat(rows), 1e-11)


@pytest.mark.parametrize("kind", [DotsLabels, AdamLabels, JvpLabels])
def test_a_document_does_not_know_its_batch(probed, kind):
    view, references, *_ = probed
    together, alone, cut = (
        influence(kind(view.model, view, references, TASK, batch=batch)) for batch in (len(DOCUMENTS[0]), 1, 4)
    )
    for one in (alone, cut):
        for ours, theirs in zip(one, together, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-15, equal_nan=True)


def test_without_vocabulary_matrices_both_ways_leave_the_same_out(probed):
    view, references, single, along = probed
    special = vocabulary(view, TASK, references[0])
    truth = along_steps(view, single, along, lambda p, g: torch.zeros_like(g) if p in special else -view.slope(p) * g)
    dots = DotsLabels(view.model, view, references, TASK, vocab="drop", capped=False)
    jvp = JvpLabels(view.model, view, references, TASK, vocab="drop", capped=False)
    assert close(without_null_gain(dots), truth, 1e-11)
    clips = view.clip_factors(norms_of(single))
    assert close(without_null_gain(jvp) * clips[:, None], truth, 1e-11)
