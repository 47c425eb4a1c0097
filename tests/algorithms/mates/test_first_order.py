"""First-order labels agree with materialised gradients to rounding, with each other, and with real steps in rank."""

import copy

import pytest
import torch
from tiny_lm import TinyLM
from torch import nn
from torch.utils.checkpoint import checkpoint

from algorithms.mates.models import TASK, bytes_of, documents, reference, trained
from algorithms.models import language_model, sentences
from ghostgram.algorithms.mates.labels.exact import ExactLabels
from ghostgram.algorithms.mates.labels.first_order import AdamLabels, DotsLabels
from ghostgram.algorithms.mates.labels.forward import DifferenceLabels, JvpLabels
from ghostgram.algorithms.mates.labels.linear import slopes, vocabulary
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.algorithms.mates.labels.task import padded
from ghostgram.algorithms.mates.stats import spearman


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


def single_gradients(view, ids, mask):
    """A document's gradient, by parameter, for every document."""
    found = []
    for i in range(len(ids)):
        loss = TASK.losses(view.model, ids[i : i + 1], mask[i : i + 1]).sum()
        gradients = torch.autograd.grad(loss, list(view.names), allow_unused=True, materialize_grads=True)
        found.append(dict(zip(view.names, gradients, strict=True)))
    return found


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def probed(request):
    """(view, references, single gradients by document, references' gradients at theta_null), in float64."""
    model, optimizer = trained(build=request.param)
    view = OptimizerView(model, optimizer, clip=None)
    references = [reference(), reference(5, 2, "other")]
    single = single_gradients(view, *DOCUMENTS)
    view.clip = float(norms_of(single).median())  # half of them are clipped
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
    assert names == {
        TinyLM: {"token.weight"},
        Untied: {"token.weight", "head.weight", "head.bias"},
        Adapted: set(),
    }.get(type(view.model), {"token.weight"})
    rows = []
    for text, mask, one in zip(*DOCUMENTS, single, strict=True):
        own = torch.zeros(256, dtype=torch.bool)
        own[text[: int(mask.nonzero().max()) + 1]] = True

        def step(p, g, own=own):
            linear = -view.slope(p) * g
            return (
                torch.where(own.view(-1, *(1,) * (g.dim() - 1)), view.delta(p, g), linear) if p in special else linear
            )

        rows.append(along_steps(view, [one], along, step))
    backend = DotsLabels(view.model, view, references, TASK, capped=False)
    assert close(without_null_gain(backend), torch.cat(rows), 1e-11)


def test_slopes_are_capped_where_typical_entries_saturate(probed):
    """At an entry of typical size the capped step's linear and real growth of the second moment meet."""
    view, references, *_ = probed
    found, share = slopes(view, references, TASK, capped=True)
    squares, counts = dict.fromkeys(view.names, 0.0), dict.fromkeys(view.names, 0)
    for r in references:
        for text, mask in zip(r.ids, r.mask, strict=True):
            grads = torch.autograd.grad(TASK.losses(view.model, text[None], mask[None]).sum(), list(view.names))
            clip = min(1.0, view.clip / (float(torch.cat([g.flatten() for g in grads]).norm()) + 1e-6))
            for p, g in zip(view.names, grads, strict=True):
                squares[p] += float((clip * g).square().sum())
                counts[p] += int((g != 0).sum())
    cut = 0
    for p in view.names:
        eta, b1, b2, _, bc1, bc2 = view.scalars(p)
        gamma = (squares[p] / counts[p]) ** 0.5
        cap = eta * (1 - b1) / bc1 / (gamma * ((1 - b2) / bc2) ** 0.5)
        assert close(found[p], view.slope(p).clamp(max=cap), 1e-12)
        cut += int((view.slope(p) > cap).sum())
    assert 0 < share == cut / sum(p.numel() for p in view.names)


@pytest.mark.parametrize("kind", [DotsLabels, AdamLabels, JvpLabels])
def test_a_document_does_not_know_its_batch(probed, kind):
    view, references, *_ = probed
    backend = kind(view.model, view, references, TASK, batch=4)
    in_fours = influence(backend)
    one_by_one = [backend.influence(*(x[i : i + 1] for x in DOCUMENTS)) for i in range(len(DOCUMENTS[0]))]
    for ours, theirs in zip(in_fours, map(torch.cat, zip(*one_by_one, strict=True)), strict=True):
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


def test_as_many_positions_as_documents_are_no_obstacle(probed):
    """A batch whose positions could be taken for one id per document."""
    view, references, *_ = probed
    ids, mask = (x[:, :12] for x in DOCUMENTS)
    assert len(ids) == int(mask.any(0).nonzero().max())
    backend = DotsLabels(view.model, view, references, TASK)
    backend.prepare()
    alone = torch.cat([backend.influence(ids[i : i + 1], mask[i : i + 1]).values for i in range(len(ids))])
    assert close(backend.influence(ids, mask).values, alone, 1e-9)


@pytest.mark.parametrize("kind", ["gpt2 tied", "llama"])
def test_models_of_transformers_agree_with_materialised_gradients(kind):
    """Their Conv1D has its weight the other way round; their norms compute in float32."""
    model, (ids, mask) = language_model(kind).eval(), padded(list(sentences(9, 3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for start in (0, 3, 6):
        TASK.losses(model, ids[start : start + 3], mask[start : start + 3]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    view, references = OptimizerView(model, optimizer, clip=1.0), [Reference("kept", ids[:4], mask[:4])]
    with view.at_null():
        along = references[0].gradient(model, TASK)
    single = single_gradients(view, ids, mask)
    tables = {"gpt2 tied": {"wte"}, "llama": {"embed_tokens", "lm_head"}}
    special = vocabulary(view, TASK, references[0])
    assert {view.names[p].split(".")[-2] for p in special} == tables[kind]
    for backend, step in (
        (AdamLabels(model, view, references, TASK), view.delta),
        (DotsLabels(model, view, references, TASK, vocab="frozen", capped=False), lambda p, g: -view.slope(p) * g),
    ):
        assert backend.why_not() is None
        backend.prepare()
        ours = backend.influence(ids, mask).values - backend.null_gain
        assert close(ours, along_steps(view, single, [along], step), 1e-6 if kind == "llama" else 1e-12)


SETTINGS = [
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=["AdamW", "amsgrad", "coupled decay", "SGD"])
def test_a_small_step_has_the_labels_of_the_real_one(kind, settings):
    """In value, null gain included: what is left is of the second order in the learning rate."""
    model, optimizer = trained(kind, grouped=True, **settings)
    view = OptimizerView(model, optimizer, clip=0.5, lrs=[1e-7, 3e-7])
    references = [reference(), reference(5, 2, "other")]
    truth = influence(ExactLabels(model, view, references, TASK))
    tried = [DotsLabels(model, view, references, TASK, vocab="adam_rows")]
    if kind is torch.optim.AdamW and "amsgrad" not in settings:
        tried.append(AdamLabels(model, view, references, TASK))
    for backend in tried:
        ours = influence(backend)
        near = 1e-4 if isinstance(backend, AdamLabels) or view.linear else 0.3  # rows apart, v is frozen
        assert close(ours.values, truth.values, near)
        assert torch.allclose(ours.norms, truth.norms)
        assert torch.allclose(ours.clip, truth.clip)
        assert torch.allclose(ours.own_loss, truth.own_loss)


@pytest.fixture(scope="module")
def in_float32():
    model, optimizer = trained(dtype=torch.float32, steps=20)
    return model, OptimizerView(model, optimizer, clip=1.0), [reference(24), reference(24, 2, "other")]


def test_differences_rank_documents_as_their_limit_does(in_float32):
    model, view, references = in_float32
    documents_ = bytes_of(documents(64, 9))
    found = []
    for kind in (DifferenceLabels, JvpLabels):
        backend = kind(model, view, references, TASK)
        assert backend.why_not() is None
        backend.prepare()
        found.append(backend.influence(*documents_))
    for ours, theirs in zip(found[0].values.T, found[1].values.T, strict=True):
        assert spearman(ours, theirs) >= 0.999
    assert torch.allclose(found[0].own_loss, found[1].own_loss, rtol=1e-4)
    assert found[0].norms.isnan().all()


def test_16_bit_weights_are_refused_for_differences(in_float32):
    model = copy.deepcopy(in_float32[0]).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for p, q in zip(model.parameters(), in_float32[1].names, strict=True):
        optimizer.state[p] = {n: x.clone() for n, x in in_float32[1].optimizer.state[q].items()}
    backend = DifferenceLabels(model, OptimizerView(model, optimizer, clip=1.0), [reference(24)], TASK)
    with pytest.raises(RuntimeError, match=r"labels of 24 documents do not agree .* 16-bit weights"):
        backend.prepare()


def test_a_step_without_slope_is_refused():
    model, _ = trained(steps=0)
    optimizer = torch.optim.Adagrad(model.parameters())
    view = OptimizerView(model, optimizer, clip=None)
    for kind in (DotsLabels, AdamLabels, JvpLabels, DifferenceLabels):
        assert "Adagrad has no closed form" in kind(model, view, [reference()], TASK).why_not()
    model, optimizer = trained(torch.optim.SGD)
    view = OptimizerView(model, optimizer, clip=None)
    assert "no second moment" in AdamLabels(model, view, [reference()], TASK).why_not()


def test_a_weight_that_no_tap_covers_is_named():
    class Scaled(TinyLM):
        def __init__(self, **sizes):
            super().__init__(**sizes)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, text):
            return super().forward(text) * self.scale

    model, optimizer = trained(build=Scaled)
    view = OptimizerView(model, optimizer, clip=None)
    assert "scale" in DotsLabels(model, view, [reference()], TASK).why_not()
    assert JvpLabels(model, view, [reference()], TASK).why_not() is None


@pytest.mark.parametrize(("kind", "vocab"), [(DotsLabels, "rows"), (JvpLabels, "adam_rows")])
def test_unknown_treatment_of_the_vocabulary_is_refused(in_float32, kind, vocab):
    model, view, references = in_float32
    with pytest.raises(ValueError, match=f"vocab: expected .*'frozen'.*, got '{vocab}'"):
        kind(model, view, references, TASK, vocab=vocab)
