"""What layers keep of a backward gives the weighted sums and Gram matrices of single samples' gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ghostgram.taps import Taps, cover
from ghostgram.taps.uses import accumulate, gram
from single_samples import B, gradients, in_dtype, loss_of, real, trained
from taps import test_attention, test_conv, test_own_forward, test_taps
from taps.test_taps import D, TiedHead, V

MODELS = {
    **{f"taps: {name}": made for name, made in test_taps.MODELS.items()},
    **{f"conv: {name}": made for name, made in test_conv.MODELS.items()},
    **{f"own: {name}": made for name, made in test_own_forward.MODELS.items()},
    **{f"attention: {name}": (made, real(test_attention.S, test_attention.E))
       for name, made in test_attention.MODELS.items()},
}  # fmt: skip
SOME = [f"taps: {name}" for name in ("linear 3-D", "tied, three uses", "layer norm", "group norm 4-D", "conv1d")]


def tolerance_of(name):
    """Some norms compute in float32 whatever the input."""
    return 1e-5 if any(kind in name for kind in ("gemma", "llama", *test_own_forward.IN_FLOAT32)) else 1e-10


def build(name, dtype):
    return in_dtype(*MODELS[name], dtype)


WEIGHTS = torch.tensor([0.0, 1.5, 0.0, 2.0, -0.25], dtype=torch.float64)


def kept_of(model, x, scored=None, loss=loss_of):
    """The uses that one backward keeps, and checks that it leaves .grad alone."""
    coverage = cover(model, [p for p in model.parameters() if p.requires_grad])
    taps = Taps(coverage, [] if scored is None else scored)
    before = {p: None if p.grad is None else p.grad.clone() for p in model.parameters()}
    with taps.samples(B, {p: torch.randn(2, *p.shape, dtype=p.dtype) for p in scored or []}, gradients="later"):
        loss(model, x).backward()
    for p, grad in before.items():
        assert p.grad is None if grad is None else torch.equal(p.grad, grad)
    return taps.kept()


def single_gradients(model, x):
    """(B, *shape) of every parameter, by a separate backward for every sample."""
    each = [gradients(model, x[i : i + 1]) for i in range(len(x))]
    return {p: torch.stack(g) for p, g in zip(trained(model), zip(*each, strict=True), strict=True)}


def close(ours, truth, tolerance):
    return (ours - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("scored", [False, True], ids=["excluded from scores", "scored"])
@pytest.mark.parametrize("name", MODELS)
def test_weighted_sums_are_those_of_single_samples(name, scored):
    model, x = build(name, torch.float64)
    truth = single_gradients(model, x)
    x.grad = None
    accumulate(kept_of(model, x, trained(model) if scored else None), WEIGHTS)
    accumulate(kept := kept_of(model, x), 2 * WEIGHTS)
    assert kept == []
    for p, each in truth.items():
        assert not p.grad.requires_grad  # nor does it hold on to the graph
        assert close(p.grad, 3 * torch.tensordot(WEIGHTS, each, 1), tolerance_of(name))


@pytest.mark.parametrize("scale", ["number", "tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_gram_matrices_are_those_of_single_samples(name, scale):
    model, x = build(name, torch.float64)
    truth = single_gradients(model, x)
    scales = {p: 0.5 if scale == "number" else torch.rand_like(p).detach() for p in model.parameters()}
    flat = torch.cat([(each * scales[p]).flatten(1) for p, each in truth.items()], 1)
    ours = gram(kept_of(model, x), scales.__getitem__)
    assert close(ours, flat @ flat.T, tolerance_of(name))


@pytest.mark.parametrize("scale", ["number", "tensor"])
def test_a_large_gram_is_formed_in_parts(scale, monkeypatch):
    """With room for three entries at a time."""
    monkeypatch.setattr("ghostgram.taps.uses.AT_ONCE", 3 * B * D)
    model, x = build("taps: tied, three uses", torch.float64)
    weight = model.tok.weight
    each = single_gradients(model, x)[weight]
    P = 2.0 if scale == "number" else torch.rand_like(weight).detach()
    flat = (P * each).flatten(1)
    assert close(gram(kept_of(model, x), lambda _: P), flat @ flat.T, 1e-10)


class PerPosition(nn.Module):
    """Layers that keep positions apart, so that a document's gradient is that of its own positions' loss."""

    def __init__(self):
        super().__init__()
        self.tok, self.norm, self.head = nn.Embedding(V, D, padding_idx=3), nn.LayerNorm(D), nn.Linear(D, V)
        self.head.weight = self.tok.weight

    def forward(self, ids):
        return torch.tanh(self.head(self.norm(self.tok(ids))))


def test_documents_are_weighted_like_samples():
    torch.manual_seed(0)
    model, ids = PerPosition().double(), torch.randint(0, V, (B, 7))
    segments = torch.randint(-1, 4, (B, 7))
    mine = [segments == document for document in range(4)]
    each = [torch.autograd.grad(model(ids)[m].sum(), list(model.parameters())) for m in mine]
    truth = {p: torch.stack(g) for p, g in zip(trained(model), zip(*each, strict=True), strict=True)}
    taps = Taps(cover(model, model.parameters()), [])
    with taps.samples(B, {}, segments=segments, documents=4, gradients="later"):
        model(ids)[segments >= 0].sum().backward()
    kept = taps.kept()
    with pytest.raises(ValueError, match="gram: expected rows that are samples, got documents"):
        gram(kept, lambda _: 1.0)
    accumulate(kept, WEIGHTS[:4])
    for p, g in truth.items():
        assert close(p.grad, torch.tensordot(WEIGHTS[:4], g, 1), 1e-10)


@pytest.mark.parametrize("name", SOME)
def test_under_autocast_sums_agree_to_bfloat16(name):
    model, x = build(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(model, x)
        kept = kept_of(model, x)
    accumulate(kept, torch.ones(B))
    for p, truth in zip(model.parameters(), plain, strict=True):
        assert p.grad.dtype == torch.float32
        assert close(p.grad, truth, 1e-2)


def test_no_weight_at_all_gives_zero():
    model, x = build("taps: tied, three uses", torch.float64)
    accumulate(kept_of(model, x), torch.zeros(B))
    assert all(not p.grad.any() for p in model.parameters())


def test_frozen_parameters_are_not_kept():
    model = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D))
    model[0].bias.requires_grad_(False)
    kept = kept_of(model, torch.randn(B, 4, D))
    assert {p for p, _ in kept} == {model[0].weight, *model[1].parameters()}


def test_a_weight_used_past_its_layer_is_refused_by_name():
    model = TiedHead()

    def loss(model, ids):
        return F.linear(model.tok(ids), model.tok.weight).sum()

    with pytest.raises(RuntimeError, match=r"tok.weight: a gradient reached it past its layer's forward"):
        kept_of(model, torch.randint(0, V, (B, 7)), loss=loss)
    loss(model, torch.randint(0, V, (B, 7))).backward()  # the guard is gone with the step
