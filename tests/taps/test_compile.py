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


@pytest.mark.parametrize("packed", [False, True], ids=["samples", "documents"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_with_the_eager_dots(backend, packed):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, ids = Language(), torch.randint(0, V, (B, T))
    segments = torch.arange(B * T).view(B, T) // 5 if packed else None
    coverage = cover(model, model.parameters())
    taps = Taps(coverage, list(coverage.scored.values()))
    compiled = torch.compile(model, fullgraph=True, backend=backend)  # fullgraph: a graph break is an error

    def scored(module, directions):
        model.zero_grad()
        with taps.samples(B, directions, segments=segments, documents=6):
            F.cross_entropy(module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        return [*taps.dots().values(), *(p.grad for p in model.parameters())]

    for step in range(3):
        directions = {p: torch.randn(2, *p.shape) for p in model.parameters()}
        for ours, eager in zip(scored(compiled, directions), scored(model, directions), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
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
