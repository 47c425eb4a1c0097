"""The tap of nn.MultiheadAttention: torch's outputs, weights and random numbers, and the dots of single samples."""

import copy

import pytest
import torch
from torch import nn

from ghostgram.taps import Taps, cover
from single_samples import (
    B,
    Checkpointed,
    assert_agrees,
    assert_autocast_agrees,
    directions_for,
    in_dtype,
    loss_of,
    real,
    tapped,
    trained,
)

E, S, T = 8, 6, 4


def padded(samples):
    """True at the last positions of some samples: what attention must not look at."""
    mask = torch.zeros(samples, S, dtype=torch.bool)
    mask[:, -1] = True
    return mask


def causal(dtype=torch.bool):
    return nn.Transformer.generate_square_subsequent_mask(S) if dtype != torch.bool else torch.ones(S, S).triu(1).bool()


class Attention(nn.Module):
    """Attention of x (B, S, E) to itself, or of its first T positions to all of them and to their doubles as values."""

    def __init__(self, cross="", call=(), **options):
        super().__init__()
        self.layer = nn.MultiheadAttention(E, 2, **options)
        for parameter in self.layer.parameters():  # biases start as zeros
            nn.init.normal_(parameter, std=0.5)
        self.cross, self.call = cross, dict(call)

    def options(self, x):
        call = dict(self.call)
        if call.pop("padded", False):
            call["key_padding_mask"] = padded(len(x))
        if call.get("attn_mask") == "per head":
            mask = torch.arange(2 * T * S).view(2, T, S).sin().to(x.dtype)
            call["attn_mask"] = mask.repeat(len(x), 1, 1)
        elif "attn_mask" in call:
            mask = call["attn_mask"]
            call["attn_mask"] = mask if mask.dtype == torch.bool else mask.to(x.dtype)
        return call

    def attend(self, x):
        """The layer's two results, the sample first."""
        q, k, v = x, x, x
        if self.cross:
            q, k = x[:, :T], x
            v = k if self.cross == "shared" else 2 * x
        if self.layer.kdim != E:
            k, v = x[..., : self.layer.kdim], x[..., : self.layer.vdim] * 2
        if not self.layer.batch_first:
            transposed = {id(y): y.transpose(0, 1) for y in (q, k, v)}
            q, k, v = (transposed[id(y)] for y in (q, k, v))
        y, weights = self.layer(q, k, v, **self.options(x))
        return y if self.layer.batch_first else y.transpose(0, 1), weights

    def forward(self, x):
        y, weights = self.attend(x)
        return torch.tanh(y) if weights is None else torch.cat([torch.tanh(y).flatten(1), weights.flatten(1)], 1)


first = {"batch_first": True}
MODELS = {
    "self": lambda: Attention(**first),
    "self, sample on axis 1": lambda: Attention(),
    "self, without weights": lambda: Attention(**first, call={"need_weights": False}),
    "self, weights by head": lambda: Attention(**first, call={"average_attn_weights": False}),
    "no bias": lambda: Attention(**first, bias=False),
    "keys are values": lambda: Attention("shared", **first),
    "keys are values, sample on axis 1": lambda: Attention("shared"),
    "three inputs": lambda: Attention("three", **first, call={"need_weights": False}),
    "kdim and vdim": lambda: Attention("three", **first, kdim=5, vdim=3),
    "kdim and vdim, sample on axis 1": lambda: Attention("three", kdim=5, vdim=3),
    "bias_k and bias_v": lambda: Attention(**first, add_bias_kv=True),
    "bias_k, zeros, masks": lambda: Attention(
        add_bias_kv=True, add_zero_attn=True, call={"padded": True, "attn_mask": causal()}
    ),
    "padding": lambda: Attention(**first, call={"padded": True, "need_weights": False}),
    "causal, float": lambda: Attention(**first, call={"attn_mask": causal(torch.float32)}),
    "causal, hint": lambda: Attention(call={"attn_mask": causal(), "is_causal": True, "need_weights": False}),
    "causal, hint, padding": lambda: Attention(
        **first, call={"attn_mask": causal(), "is_causal": True, "need_weights": False, "padded": True}
    ),
    "a mask for each head": lambda: Attention("shared", **first, call={"attn_mask": "per head"}),
    "checkpointed": lambda: Checkpointed(Attention(**first, add_bias_kv=True), False),
    "checkpointed, reentrant": lambda: Checkpointed(Attention(), True),
}  # fmt: skip


@pytest.mark.parametrize("late", [False, True], ids=["directions known", "directions late"])
@pytest.mark.parametrize("name", MODELS)
def test_dots_and_gradients(name, late):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, x = in_dtype(MODELS[name], real(S, E), dtype)
        assert_agrees(model, x, tolerance, late)
        assert_agrees(model.eval(), x, tolerance, late)
        if not late:
            assert_agrees(model, x, tolerance, gradients=False)


@pytest.mark.parametrize("frozen", ["in_proj", "out_proj", "bias", "weight"])
def test_some_parameters_frozen(frozen):
    """Attention reads the weight of its out_proj itself, and must be tapped for that alone too."""
    model, x = in_dtype(MODELS["bias_k and bias_v"], real(S, E), torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    assert_agrees(model, x, 1e-10)


@pytest.mark.parametrize("name", [name for name in MODELS if "checkpointed" not in name])
def test_outputs_weights_and_dropout_are_torchs(name):
    model, x = in_dtype(MODELS[name], real(S, E), torch.float64)
    for dropout in (0.0, 0.3):
        model.layer.dropout = dropout
        torch.manual_seed(1)
        expected = model.attend(x)
        with Taps(cover(model, model.parameters()), []).samples(B, None):
            torch.manual_seed(1)
            for ours, theirs in zip(model.attend(x), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["self", "keys are values", "bias_k, zeros, masks", "padding"])
def test_autocast_agrees_with_its_own_gradient(name):
    assert_autocast_agrees(*in_dtype(MODELS[name], real(S, E), torch.float32))


class Encoder(nn.Module):
    def __init__(self, batch_first, norm_first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, 2, 12, 0.0, batch_first=batch_first, norm_first=norm_first)
        self.stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), enable_nested_tensor=batch_first)
        self.batch_first = batch_first

    def forward(self, x):
        mask = padded(len(x))
        if self.batch_first:
            return self.stack(x, src_key_padding_mask=mask)
        return self.stack(x.transpose(0, 1), src_key_padding_mask=mask).transpose(0, 1)


class Decoder(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerDecoderLayer(E, 2, 12, 0.0, activation="gelu", batch_first=batch_first)
        self.stack, self.batch_first = nn.TransformerDecoder(layer, 2, nn.LayerNorm(E)), batch_first

    def forward(self, x):
        memory, x = x[:, T:], x[:, :T]
        mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=x.dtype)
        if self.batch_first:
            return self.stack(x, memory, tgt_mask=mask, tgt_is_causal=True)
        return self.stack(x.transpose(0, 1), memory.transpose(0, 1), tgt_mask=mask).transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False], ids=["sample on axis 0", "sample on axis 1"])
@pytest.mark.parametrize("kind", [Encoder, Decoder])
@pytest.mark.parametrize("samples", [B, S], ids=["fewer samples than positions", "as many"])
def test_transformers(kind, batch_first, samples):
    """In train and in eval mode, where torch has a fast path that no module's forward sees; square batches too."""
    model, x = in_dtype(lambda: kind(batch_first), real(S, E), torch.float64)
    if samples != B:
        x = torch.randn(samples, S, E, dtype=torch.float64)
    directions = directions_for(model)
    for mode in (True, False):
        model.train(mode).zero_grad()
        coverage = cover(model, trained(model))
        taps = Taps(coverage, list(coverage.scored.values()))
        with taps.samples(samples, directions):
            loss_of(model, x).backward()
        for parameter, D in directions.items():
            total, whole = taps.dots()[parameter].sum(0), (D * parameter.grad).flatten(1).sum(1)
            assert (total - whole).abs().max() <= 1e-10 * parameter.grad.norm() * D.norm()
        half = copy.deepcopy(model)
        half.zero_grad()
        loss_of(half, x[:2]).backward()
        for (parameter, D), twin in zip(directions.items(), half.parameters(), strict=True):
            ours, alone = taps.dots()[parameter][:2].sum(0), (D * twin.grad).flatten(1).sum(1)
            assert (ours - alone).abs().max() <= 1e-10 * parameter.grad.norm() * D.norm()


def test_documents_by_position():
    """Rows of packed documents: positions of one document per row are the samples."""
    model, x = in_dtype(MODELS["self"], real(S, E), torch.float64)
    directions = directions_for(model)
    rows = tapped(model, x, directions)
    segments = torch.arange(B)[:, None].expand(B, S).contiguous()
    documents = tapped(model, x, directions, segments=segments, documents=B)
    for parameter, D in directions.items():
        torch.testing.assert_close(documents[parameter], rows[parameter], rtol=1e-9, atol=1e-10 * D.norm())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("self", (S, E), "expected a query with a sample axis"),
        ("self", (B + 1, S, E), rf"first dimension is the sample \({B}\)"),
    ],
)
def test_wrong_inputs_are_errors(name, shape, message):
    model, x = MODELS[name]().layer, torch.randn(shape)
    with Taps(cover(model, model.parameters()), []).samples(B, None), pytest.raises(ValueError, match=message):
        model(x, x, x)


def test_a_position_of_no_document_is_an_error():
    model, x = in_dtype(MODELS["bias_k and bias_v"], real(S, E), torch.float64)
    with pytest.raises(ValueError, match="bias_k is a position of no document"):
        tapped(model, x, None, segments=torch.zeros(B, S, dtype=torch.long), documents=1)
