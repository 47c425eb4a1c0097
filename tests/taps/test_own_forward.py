"""Layers tapped by the derivative of their own forward: third parties' norms, scales, gates, and odd linear layers."""

import pytest
import torch
from torch import nn

from ghostgram.taps import Taps, cover
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
    norm,
    real,
    tapped,
)

pytest.importorskip("transformers")
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

D, V = 6, 23


class Gate(nn.Module):
    """A layer between the two halves of its input's features."""

    def __init__(self, layer, keyword=""):
        super().__init__()
        self.layer, self.keyword = layer, keyword

    def forward(self, x):
        x, gate = x.chunk(2, -1)
        return torch.tanh(self.layer(x, **{self.keyword: gate}) if self.keyword else self.layer(x, gate))


class Snake(nn.Module):
    """An activation that is not linear in its parameter."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.linspace(0.5, 2, D))

    def forward(self, x):
        return x + torch.sin(self.alpha * x) ** 2 / self.alpha


class Doubled(nn.RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Bags(nn.Module):
    """Bags of ids from the rows of a (B, n) table, of equal length, by offsets, or weighted."""

    def __init__(self, how, **options):
        super().__init__()
        self.how, self.layer = how, nn.EmbeddingBag(V, D, **options)

    def forward(self, ids):
        how, weights = self.how, (ids * 0.37).sin().to(self.layer.weight.dtype)
        if how == "weighted":
            return self.layer(ids, per_sample_weights=weights)
        if how == "equal":
            return self.layer(ids)
        lengths = 1 + ids[:, 0] % 3
        if how == "one empty":
            lengths = ids[:, 0] % 3
        kept = torch.arange(ids.shape[1]) < lengths[:, None]
        offsets = lengths.cumsum(0) - lengths
        if self.layer.include_last_offset:
            offsets = torch.cat([offsets, lengths.sum()[None]])
        weights = weights[kept] if how == "offsets, weighted" else None
        return self.layer(ids[kept], offsets, per_sample_weights=weights)


def ids():
    return torch.randint(0, V, (B, 4))


def conv():
    return WeightStandardizedConv2d(3, 4, 3)


MODELS = {
    "T5's norm": (lambda: Tower(norm(T5LayerNorm(D))), real(4, D)),
    "gpt-oss's norm": (lambda: Tower(norm(GptOssRMSNorm(D))), real(4, D)),
    "Cohere's norm": (lambda: Tower(norm(CohereLayerNorm(D))), real(4, D)),
    "Cohere's norm by head": (lambda: Tower(norm(CohereLayerNorm((2, D)))), real(4, 2, D)),
    "ConvNext's norm, channels last": (lambda: Tower(norm(ConvNextLayerNorm(D))), real(3, 2, D)),
    "ConvNext's norm, channels first": (
        lambda: Tower(norm(ConvNextLayerNorm(D, data_format="channels_first"))), real(D, 3, 2)
    ),
    "Mamba's gated norm": (lambda: Gate(norm(MambaRMSNormGated(D, 3))), real(4, 2 * D)),
    "Mamba's gated norm, by keyword": (lambda: Gate(norm(MambaRMSNormGated(D, 3)), "gate"), real(4, 2 * D)),
    "Falcon's linear": (lambda: Tower(FalconLinear(D, 4)), real(4, D)),
    "weight-standardised convolution": (lambda: Tower(conv()), real(3, 5, 5)),
    "Bart's scaled embedding": (lambda: Tower(BartScaledWordEmbedding(V, D, 3, embed_scale=2.0)), ids),
    "twice an rms norm": (lambda: Tower(norm(Doubled(D))), real(4, D)),
    "snake": (lambda: Tower(Snake()), real(4, D)),
    "prelu, one slope": (lambda: Tower(nn.PReLU()), real(4, D)),
    "prelu by channel": (lambda: Tower(norm(nn.PReLU(D))), real(D, 3, 2)),
    "prelu by channel, 5-D": (lambda: Tower(norm(nn.PReLU(D))), real(D, 3, 2, 2)),
    "prelu 2-D": (lambda: Tower(norm(nn.PReLU(D))), real(D)),
    "bilinear": (lambda: Gate(nn.Bilinear(D, D, 4)), real(4, 2 * D)),
    "bilinear without bias": (lambda: Gate(nn.Bilinear(D, D, 4, bias=False)), real(2 * D)),
    "called twice": (lambda: CalledTwice(norm(CohereLayerNorm(D))), real(4, D)),
    "not contiguous": (lambda: NotContiguous(norm(CohereLayerNorm(D))), real(4, D)),
    "channels last": (lambda: ChannelsLast(norm(nn.PReLU(D))), real(D, 3, 2)),
    "checkpointed": (lambda: Checkpointed(norm(nn.PReLU(D)), False), real(D, 3)),
    "checkpointed, reentrant": (lambda: Checkpointed(norm(CohereLayerNorm(D)), True), real(4, D)),
    "bags": (lambda: Tower(Bags("equal")), ids),
    "bags, sums": (lambda: Tower(Bags("equal", mode="sum")), ids),
    "bags, padding": (lambda: Tower(Bags("equal", padding_idx=2)), ids),
    "bags by offsets": (lambda: Tower(Bags("offsets")), ids),
    "bags by offsets and an end, sums": (lambda: Tower(Bags("offsets", mode="sum", include_last_offset=True)), ids),
    "bags, some empty": (lambda: Tower(Bags("one empty")), ids),
    "bags, weighted": (lambda: Tower(Bags("weighted", mode="sum", padding_idx=2)), ids),
    "bags by offsets, weighted": (lambda: Tower(Bags("offsets, weighted", mode="sum")), ids),
    "bags, called twice": (lambda: nn.Sequential(Bags("equal"), nn.Tanh()), ids),
}  # fmt: skip
IN_FLOAT32 = ("Cohere", "T5", "gpt-oss", "Mamba", "called twice", "not contiguous", "checkpointed, reentrant")


@pytest.mark.parametrize("late", [False, True], ids=["directions known", "directions late"])
@pytest.mark.parametrize("name", MODELS)
def test_dots_and_gradients(name, late):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        if name.startswith(IN_FLOAT32):  # norms that compute in float32 whatever the input
            tolerance = 1e-5
        model, x = in_dtype(*MODELS[name], dtype)
        assert_agrees(model, x, tolerance, late)
        if not late:
            assert_agrees(model.eval(), x, tolerance, gradients=False)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", ["ConvNext's norm, channels first", "bilinear", "Falcon's linear"])
def test_one_of_two_parameters_frozen(name, frozen):
    model, x = in_dtype(*MODELS[name], torch.float64)
    if name == "Falcon's linear" and model.layer.bias is None:
        pytest.skip("Falcon's linear has no bias")
    getattr(model.layer, frozen).requires_grad_(False)
    assert_agrees(model, x, 1e-10)


@pytest.mark.parametrize("name", ["T5's norm", "Falcon's linear", "prelu by channel", "bags", "bilinear"])
def test_autocast_agrees_with_its_own_gradient(name):
    assert_autocast_agrees(*in_dtype(*MODELS[name], torch.float32))


def test_directions_far_smaller_than_bfloat16_weights():
    """Directions are steps of the optimizer: they must not be rounded to the weight's neighbours."""
    model, x = in_dtype(*MODELS["Cohere's norm"], torch.bfloat16)
    directions = {p: 1e-6 * torch.randn(2, *p.shape) for p in model.parameters()}
    small = tapped(model, x, directions)
    large = tapped(model, x, {p: 2**20 * D_k for p, D_k in directions.items()})
    for parameter, dots in small.items():
        torch.testing.assert_close(2**20 * dots, large[parameter], rtol=1e-4, atol=0)


def test_output_is_the_layers_own_to_the_bit():
    for name in ("Cohere's norm", "prelu by channel", "bags, weighted", "weight-standardised convolution"):
        model, x = in_dtype(*MODELS[name], torch.float32)
        with Taps(cover(model, model.parameters()), []).samples(B, None):
            ours = model(x)
        assert torch.equal(ours, model(x))


class Learned(nn.Embedding):
    """Positions from the shape of ids, as (T, d) or (1, T, d): the same rows for every sample."""

    def forward(self, ids, row=True):
        positions = torch.arange(ids.shape[1])
        return super().forward(positions[None] if row else positions)


class Placed(nn.Module):
    def __init__(self, row):
        super().__init__()
        self.tok, self.pos, self.row = nn.Embedding(V, D), Learned(9, D), row

    def forward(self, ids):
        return torch.tanh(self.tok(ids) + self.pos(ids, self.row))


@pytest.mark.parametrize("row", [True, False])
def test_positions_get_the_axis_of_samples(row):
    model, x = in_dtype(lambda: Placed(row), ids, torch.float64)
    assert_agrees(model, x, 1e-10)
    if not row:
        with (
            Taps(cover(model, model.parameters()), []).samples(4, None),
            pytest.raises(ValueError, match="Learned: rows"),
        ):
            model(x[:4])


def test_an_output_may_be_changed_in_place():
    class InPlace(Tower):
        def forward(self, x):
            return super().forward(x) + self.layer(x).add_(1).mul_(x)

    model, x = in_dtype(lambda: InPlace(norm(nn.PReLU(D))), real(D, 3), torch.float64)
    assert_agrees(model, x, 1e-10)


def test_hooks_fire_once():
    model, x = in_dtype(*MODELS["snake"], torch.float32)
    calls = []
    model.layer.register_forward_hook(lambda *_: calls.append(1))
    tapped(model, x, directions_for(model))
    assert len(calls) == 1


def test_documents_by_position_and_layers_that_mix_positions():
    model, x = in_dtype(*MODELS["Cohere's norm"], torch.float32)
    directions = directions_for(model)
    whole = tapped(model, x, directions)
    segments = torch.arange(B)[:, None].expand(B, 4).contiguous()
    documents = tapped(model, x, directions, segments=segments, documents=B)
    for parameter in directions:
        torch.testing.assert_close(documents[parameter], whole[parameter])
    convolution = "weight-standardised convolution", "WeightStandardizedConv2d: mixes positions"
    for name, message in (convolution, ("bags", "EmbeddingBag: adds up positions")):
        model, x = in_dtype(*MODELS[name], torch.float32)
        with pytest.raises(ValueError, match=message):
            tapped(model, x, None, segments=torch.zeros(B, 5, dtype=torch.long), documents=1)


def test_bags_that_are_not_samples_are_an_error():
    model = Bags("equal")
    with Taps(cover(model, model.parameters()), []).samples(B, None):
        with pytest.raises(ValueError, match=rf"EmbeddingBag: expected one bag per sample \({B}\), got 3"):
            model.layer(torch.zeros(12, dtype=torch.long), torch.tensor([0, 4, 8]))


class Drifting(nn.Module):
    """Writes to its buffer and draws a number whenever it is called."""

    def __init__(self, in_place):
        super().__init__()
        self.weight, self.in_place = nn.Parameter(torch.ones(D)), in_place
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + torch.rand(1) + 1
        return x * self.weight


@pytest.mark.parametrize("in_place", [True, False])
def test_trying_a_layer_leaves_no_trace(in_place):
    layer, state = Drifting(in_place), torch.get_rng_state()
    coverage = cover(layer, layer.parameters(), fallback="jvp")
    assert coverage.fallback == {"weight": layer.weight}
    assert coverage.rows[0].covered_by.startswith("fallback (Drifting has no tap")
    assert layer.calls == 0
    assert layer.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
