"""A tapped model under torch.compile: one graph, the eager dots, no recompilation from step to step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ghostgram.taps import Taps, cover

V, D, B, T = 23, 12, 4, 7


class Language(nn.Module):
    """Every kind of covered layer a language model has, with a tied head and a block used twice."""

    def __init__(self):
        super().__init__()
        self.tok, self.pos, self.norm, self.rms = nn.Embedding(V, D), nn.Embedding(9, D), nn.LayerNorm(D), nn.RMSNorm(D)
        self.up, self.down, self.head = nn.Linear(D, 20), nn.Linear(20, D), nn.Linear(D, V, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, ids):
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1])[None])
        for _ in range(2):
            x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(self.rms(x))


class Image(nn.Module):
    """Convolutions by either way, forwards and backwards, grouped and strided, with norms and slopes by channel."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.rest = nn.Sequential(
            nn.GroupNorm(2, 8),
            nn.PReLU(8),
            nn.Conv2d(8, 8, 3, padding="same", groups=8, padding_mode="reflect"),
            nn.ConvTranspose2d(8, 4, 3, 2, output_padding=1),
        )
        self.wide = nn.Conv2d(4, 128, 2, bias=False)

    def forward(self, x):
        return self.wide(self.rest(self.first(x))).flatten(1)


class Sequence(nn.Module):
    """torch's Transformer, sample on axis 1, and attention to other positions with a norm by its own forward."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(D, 2, 20, 0.0)
        self.cross = nn.MultiheadAttention(D, 2, add_bias_kv=True, batch_first=True)
        self.norm = Doubled(D)
        self.bag = nn.EmbeddingBag(V, D)

    def forward(self, x):
        y = self.encoder(x.transpose(0, 1)).transpose(0, 1)
        y = self.norm(y + self.cross(y, x, x)[0]).flatten(1)
        return torch.cat([y, self.bag((9 * x[..., 0].sigmoid()).long())], 1)


class Doubled(nn.RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def scores(taps, model, module, loss, directions, **options):
    """Dots, and gradients of the parameters, of a module that shares the model's parameters."""
    model.zero_grad()
    with taps.samples(B, directions, **options):
        loss(module).backward()
    return [*taps.dots().values(), *(p.grad for p in model.parameters())]


def assert_one_graph_with_the_eager_dots(model, loss, backend, **options):
    torch._dynamo.reset()
    coverage = cover(model, model.parameters())
    taps = Taps(coverage, list(coverage.scored.values()))
    compiled = torch.compile(model, fullgraph=True, backend=backend)  # fullgraph: a graph break is an error
    for step in range(3):
        directions = {p: torch.randn(2, *p.shape) for p in model.parameters()}
        ours = scores(taps, model, compiled, loss, directions, **options)
        eager = scores(taps, model, model, loss, directions, **options)
        for one, other in zip(ours, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max())
        if step == 0:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_rounding_under_autocast_is_noted(checkpointed):
    """So that the sum check of a compiled model allows for it."""
    torch._dynamo.reset()
    model, ids = Language(), torch.randint(0, V, (B, T))
    up, down = model.up, model.down
    block = lambda x: down(F.gelu(up(x)))  # noqa: E731
    run = (lambda x: checkpoint(block, x, use_reentrant=False)) if checkpointed else block
    model.forward = lambda ids: model.head(model.norm(model.rms(run(model.tok(ids) + model.pos(ids % 9)))))
    coverage = cover(model, model.parameters())
    taps = Taps(coverage, list(coverage.scored.values()))
    with taps.samples(B, {p: torch.randn(1, *p.shape) for p in model.parameters()}):
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).float().square().mean()
        loss.backward()
    names = {name for name, p in model.named_parameters() if p in taps.rounded}
    assert names == {"tok.weight", "up.weight", "up.bias", "down.weight", "down.bias", "rms.weight"}


@pytest.mark.parametrize("packed", [False, True], ids=["samples", "documents"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_language_model(backend, packed):
    torch.manual_seed(0)
    model, ids = Language(), torch.randint(0, V, (B, T))
    segments = torch.arange(B * T).view(B, T) // 5 if packed else None

    def loss(module):
        return F.cross_entropy(module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    assert_one_graph_with_the_eager_dots(model, loss, backend, segments=segments, documents=6)


@pytest.mark.parametrize(("kind", "shape"), [(Image, (B, 3, 10, 8)), (Sequence, (B, T, D))])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_models(backend, kind, shape):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(shape)

    def loss(module):
        y = module(x)
        return (y * torch.linspace(-1, 1, y.shape[1])).sum(1).tanh().sum()

    assert_one_graph_with_the_eager_dots(model, loss, backend)
