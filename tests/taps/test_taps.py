"""Taps agree with a loop over single samples, leave .grad as autograd has it, and name what they do not cover."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ghostgram.taps import Taps, UncoveredParameterError, cover
from single_samples import (
    B,
    CalledTwice,
    ChannelsLast,
    Checkpointed,
    NotContiguous,
    Tower,
    assert_agrees,
    assert_autocast_agrees,
    directions_for,
    in_dtype,
    loss_of,
    norm,
    real,
)

pytest.importorskip("transformers")
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

D, V = 12, 23


class TiedHead(nn.Module):
    """One matrix used three times: as embedding, as head, and as head again."""

    def __init__(self):
        super().__init__()
        self.tok, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, ids):
        x = self.tok(ids)
        return self.head(torch.tanh(x)) + self.head(x).roll(1, 1)


class Positions(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.tok, self.pos, self.shape = nn.Embedding(V, D), nn.Embedding(17, D), shape

    def forward(self, ids):
        positions = torch.arange(ids.shape[1])
        if self.shape == "expanded":
            positions = positions.expand(*ids.shape)
        elif self.shape == "one row":
            positions = positions.unsqueeze(0)
        return torch.tanh(self.tok(ids[:, :-1]) + self.pos(positions)[..., :-1, :])


def tokens():
    return torch.randint(0, V, (B, 7))


def tracked():
    """An InstanceNorm whose running statistics are neither 0 nor 1."""
    layer = nn.InstanceNorm2d(D, affine=True, track_running_stats=True)
    layer.running_mean += torch.linspace(-1, 1, D)
    layer.running_var += torch.linspace(0, 2, D)
    return layer


MODELS = {
    "linear 2-D": (lambda: Tower(nn.Linear(D, 9)), real(D)),
    "linear 3-D": (lambda: Tower(nn.Linear(D, 9)), real(7, D)),
    "linear 4-D": (lambda: Tower(nn.Linear(D, 9)), real(2, 3, D)),
    "linear without bias": (lambda: Tower(nn.Linear(D, 9, bias=False)), real(7, D)),
    "linear called twice": (lambda: CalledTwice(nn.Linear(D, D)), real(7, D)),
    "linear not contiguous": (lambda: NotContiguous(nn.Linear(D, 9)), real(7, D)),
    "linear checkpointed, reentrant": (lambda: Checkpointed(nn.Linear(D, 9), True), real(7, D)),
    "linear checkpointed": (lambda: Checkpointed(nn.Linear(D, 9), False), real(7, D)),
    "conv1d": (lambda: Tower(Conv1D(9, D)), real(7, D)),
    "embedding": (lambda: Tower(nn.Embedding(V, D)), tokens),
    "embedding with padding": (lambda: Tower(nn.Embedding(V, D, padding_idx=3)), tokens),
    "embedding, one id each": (lambda: Tower(nn.Embedding(V, D)), lambda: torch.randint(1, V, (B,))),
    "positions (T,)": (lambda: Positions("flat"), tokens),
    "positions (1, T)": (lambda: Positions("one row"), tokens),
    "positions (B, T) expanded": (lambda: Positions("expanded"), tokens),
    "tied, three uses": (TiedHead, tokens),
    "layer norm": (lambda: Tower(norm(nn.LayerNorm(D))), real(7, D)),
    "layer norm 2-D": (lambda: Tower(norm(nn.LayerNorm(D))), real(D)),
    "layer norm over two axes": (lambda: Tower(norm(nn.LayerNorm((3, D)))), real(4, 3, D)),
    "layer norm without bias": (lambda: Tower(norm(nn.LayerNorm(D, bias=False))), real(7, D)),
    "rms norm": (lambda: Tower(norm(nn.RMSNorm(D))), real(7, D)),
    "llama's rms norm": (lambda: Tower(norm(LlamaRMSNorm(D))), real(7, D)),
    "group norm 2-D": (lambda: Tower(norm(nn.GroupNorm(3, D))), real(D)),
    "group norm 3-D": (lambda: Tower(norm(nn.GroupNorm(3, D))), real(D, 7)),
    "group norm 4-D": (lambda: Tower(norm(nn.GroupNorm(4, D))), real(D, 5, 7)),
    "group norm, one group": (lambda: Tower(norm(nn.GroupNorm(1, D))), real(D, 3, 3)),
    "group norm, groups of one": (lambda: Tower(norm(nn.GroupNorm(D, D))), real(D, 19)),
    "group norm called twice": (lambda: CalledTwice(norm(nn.GroupNorm(3, D))), real(D, 7)),
    "group norm channels last": (lambda: ChannelsLast(norm(nn.GroupNorm(3, D))), real(D, 5, 7)),
    "group norm checkpointed": (lambda: Checkpointed(norm(nn.GroupNorm(3, D)), False), real(D, 7)),
    "instance norm 1d": (lambda: Tower(norm(nn.InstanceNorm1d(D, affine=True))), real(D, 7)),
    "instance norm 2d": (lambda: Tower(norm(nn.InstanceNorm2d(D, affine=True))), real(D, 5, 7)),
    "instance norm 3d": (lambda: Tower(norm(nn.InstanceNorm3d(D, affine=True))), real(D, 2, 3, 5)),
    "instance norm, tracked": (lambda: Tower(norm(tracked())), real(D, 2, 3)),
    "instance norm, tracked, eval": (lambda: Tower(norm(tracked()).eval()), real(D, 2, 3)),
    "gemma's rms norm": (lambda: Tower(norm(GemmaRMSNorm(D))), real(7, D)),
}  # fmt: skip


def build(name, dtype):
    return in_dtype(*MODELS[name], dtype)


@pytest.mark.parametrize("late", [False, True], ids=["directions known", "directions late"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("name", MODELS)
def test_dots_and_gradients(name, dtype, tolerance, late):
    if "gemma" in name or "llama" in name:
        tolerance = max(tolerance, 1e-5)  # they compute in float32 whatever the input
    model, x = build(name, dtype)
    assert_agrees(model, x, tolerance, late)


def test_frozen_parameters_get_no_tap():
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, 3))
    model[0].requires_grad_(False)
    coverage = cover(model, [p for p in model.parameters() if p.requires_grad])
    assert [module for module, _ in coverage.tapped] == [model[1]]
    taps = Taps(coverage, list(coverage.scored.values()))
    directions = directions_for(model)
    with taps.samples(B, directions):
        loss_of(model, torch.randn(B, 4, D)).backward()
    assert taps.dots().keys() == set(model[1].parameters())
    assert model[0].weight.grad is None


@pytest.mark.parametrize("name", ["linear 3-D", "tied, three uses", "layer norm", "group norm 4-D", "conv1d"])
def test_autocast_agrees_with_its_own_gradient(name):
    assert_autocast_agrees(*build(name, torch.float32))


def test_model_is_untouched_outside():
    model, x = build("tied, three uses", torch.float32)
    before = copy.deepcopy(model)
    coverage = cover(model, model.parameters())
    taps = Taps(coverage, list(coverage.scored.values()))
    with taps.samples(B, directions_for(model)):
        assert "forward" in vars(model.head)
    for module, twin in zip(model.modules(), before.modules(), strict=True):
        assert vars(module).keys() == vars(twin).keys()
    assert torch.equal(model(x), before(x))


def test_running_statistics_are_kept_as_torch_keeps_them():
    model, x = build("instance norm, tracked", torch.float32)
    twin = copy.deepcopy(model)
    coverage = cover(model, model.parameters())
    with Taps(coverage, []).samples(B, None):
        torch.testing.assert_close(model(x), twin(x))
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_instance_norm_needs_the_sample_axis():
    layer = nn.InstanceNorm1d(B, affine=True)
    with Taps(cover(layer, layer.parameters()), []).samples(B, None):
        with pytest.raises(ValueError, match=r"InstanceNorm1d: expected an input with a sample axis, \(B, C, ...\)"):
            layer(torch.randn(B, 7))


def test_exception_inside_removes_taps():
    model, _ = build("linear 3-D", torch.float32)
    coverage = cover(model, model.parameters())
    taps = Taps(coverage, list(coverage.scored.values()))
    with pytest.raises(ZeroDivisionError), taps.samples(B, None):
        raise ZeroDivisionError
    assert "forward" not in vars(model.layer)


def test_activations_are_let_go():
    """Taps keep no activation once backward has run."""
    # By type(o): isinstance would ask weak proxies of dead objects, which torch.compile leaves behind.
    model, x = build("linear 3-D", torch.float32)
    coverage = cover(model, model.parameters())
    taps = Taps(coverage, list(coverage.scored.values()))
    alive = sum(issubclass(type(o), torch.Tensor) and o.shape == (B, 7, 9) for o in gc.get_objects())
    with taps.samples(B, directions_for(model)):
        loss_of(model, x).backward()
    assert sum(issubclass(type(o), torch.Tensor) and o.shape == (B, 7, 9) for o in gc.get_objects()) == alive


def test_backward_after_the_step_is_an_error():
    model, x = build("linear 3-D", torch.float32)
    coverage = cover(model, model.parameters())
    taps = Taps(coverage, list(coverage.scored.values()))
    with taps.samples(B, directions_for(model)):
        loss = loss_of(model, x)
    with pytest.raises(RuntimeError, match="after its scoring step was closed"):
        loss.backward()


def test_wrong_sample_axis_is_an_error():
    model, x = build("linear 3-D", torch.float32)
    coverage = cover(model, model.parameters())
    taps = Taps(coverage, list(coverage.scored.values()))
    with pytest.raises(ValueError, match=r"Linear: expected an input whose first dimension is the sample \(4\)"):
        with taps.samples(4, None):
            model(x)


def test_positions_as_many_as_samples_are_ambiguous():
    model = Tower(nn.Embedding(V, D))
    coverage = cover(model, model.parameters())
    taps = Taps(coverage, list(coverage.scored.values()))
    with pytest.raises(ValueError, match="sample axis"), taps.samples(B, None):
        model(torch.arange(B))


def test_relative_positions_of_as_many_tokens_as_samples_are_not_taken_for_samples():
    model = nn.Embedding(2 * B, D)
    taps = Taps(coverage := cover(model, model.parameters()), list(coverage.scored.values()))
    distances = torch.arange(B) - torch.arange(B).unsqueeze(1) + B
    with pytest.raises(ValueError, match="relative positions"), taps.samples(B, None):
        model(distances)
    with taps.samples(B, None):
        model(torch.ones(B, B, dtype=torch.long))  # one type for all tokens


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.inner = nn.Parameter(torch.ones(D)), nn.Linear(D, D)


class CentredOverTheBatch(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Batched(nn.Module):
    """A layer that gives the samples back without their axis."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return (x * self.weight).flatten(0, 1)


class Widened(nn.Linear):
    """A linear layer that keeps its forward, and a parameter that this does not read."""

    def __init__(self):
        super().__init__(3, 3)
        self.gain = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Bare(), r"gate \(Bare has no tap\)"),
        (nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3)), r"1.weight_ih_l0 \(LSTM has no tap\)"),
        (nn.Embedding(4, 3, max_norm=1.0), "Embedding with max_norm"),
        (nn.Embedding(4, 3, sparse=True), "Embedding with sparse"),
        (nn.BatchNorm2d(3), r"weight \(BatchNorm2d normalises over the samples"),
        (nn.EmbeddingBag(4, 3, mode="max"), "EmbeddingBag with mode='max' is not linear"),
        (CentredOverTheBatch(D), "its samples depend on each other or on chance"),
        (Batched(), "does not turn a batch of inputs into a batch of numbers"),
        (Widened(), "gain .Widened has a tap, but not for gain"),
    ],
)
def test_uncovered_parameters_are_named(model, message):
    with pytest.raises(UncoveredParameterError, match=message):
        cover(model, model.parameters())


def test_exclude_and_foreign_parameters():
    model = Bare()
    coverage = cover(model, model.parameters(), exclude=["gate"])
    assert coverage.excluded.keys() == {"gate"}
    assert [row.covered_by for row in coverage.rows] == ["excluded", "Linear", "Linear"]
    with pytest.raises(ValueError, match="'head' matches no trainable parameter"):
        cover(model, model.parameters(), exclude=["gate", "head"])
    with pytest.raises(ValueError, match="1 of the optimizer's parameters"):
        cover(model, [*model.parameters(), nn.Parameter(torch.ones(1))], exclude=["gate"])


def test_fallback_names_what_no_tap_covers():
    model = nn.Sequential(Bare(), nn.LSTM(D, D), nn.LayerNorm(D))
    coverage = cover(model, model.parameters(), fallback="jvp", exclude=["1.bias_*"])
    weights = {"1.weight_ih_l0", "1.weight_hh_l0"}
    assert coverage.fallback.keys() == {"0.gate"} | weights
    assert coverage.excluded.keys() == {"1.bias_ih_l0", "1.bias_hh_l0"}
    assert coverage.scored.keys() == {"0.inner.weight", "0.inner.bias", "2.weight", "2.bias"}
    assert [type(module) for module, _ in coverage.tapped] == [nn.Linear, nn.LayerNorm]
    assert {row.name: row.covered_by for row in coverage.rows}["0.gate"] == "fallback (Bare has no tap)"
    with pytest.raises(ValueError, match="fallback: expected 'error' or 'jvp', got 'vmap'"):
        cover(model, model.parameters(), fallback="vmap")


def test_a_use_without_a_tap_takes_a_tied_parameter_to_the_fallback():
    model = nn.Sequential(nn.Linear(D, D), nn.LSTM(D, D))
    model[0].weight = model[1].weight_hh_l0
    coverage = cover(model, model.parameters(), fallback="jvp")
    assert "0.weight" in coverage.fallback
    assert coverage.scored.keys() == {"0.bias"}


class Keeper(nn.Module):
    """A head that keeps the bias of the layer inside it, as those of Hugging Face do."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        self.decoder = nn.Linear(D, 3)
        self.decoder.bias = self.bias


def test_who_only_keeps_a_parameter_of_a_layer_inside_needs_no_tap():
    model = Keeper()
    coverage = cover(model, model.parameters())
    assert {row.name: row.covered_by for row in coverage.rows} == {"bias": "Linear", "decoder.weight": "Linear"}
    assert [module for module, _ in coverage.tapped] == [model.decoder]


def test_the_table_names_every_parameter_and_its_share():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.LSTM(2, 1), nn.LayerNorm(2))
    table = str(cover(model, model.parameters(), fallback="jvp", exclude=["2.bias"]))
    lines = [line.split(maxsplit=3) for line in table.splitlines()]
    assert lines[0] == ["parameter", "elements", "share", "covered by"]
    assert lines[1] == ["0.weight", "12", "33.3%", "Linear"]
    assert lines[2] == ["1.weight_ih_l0", "8", "22.2%", "fallback (LSTM has no tap)"]
    assert ["all", "20", "55.6%", "fallback"] in lines
    assert ["all", "2", "5.6%", "excluded"] in lines


def test_a_replaced_forward_is_not_covered():
    model = nn.Linear(3, 3)
    model.forward = lambda x: F.linear(x, model.weight)
    with pytest.raises(UncoveredParameterError, match="has been replaced"):
        cover(model, model.parameters())
