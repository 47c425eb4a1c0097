"""What a tapped layer must agree with: a separate backward for every sample, and autograd's own gradients."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ghostgram.taps import Taps, cover

B = 5


class Tower(nn.Module):
    """A layer under test between an input of any shape and a scalar per sample."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.tanh(self.layer(x))


class CalledTwice(Tower):
    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class NotContiguous(Tower):
    def forward(self, x):
        return torch.tanh(self.layer(x.transpose(1, 2).contiguous().transpose(1, 2))).transpose(1, 2)


class ChannelsLast(Tower):
    def forward(self, x):
        return super().forward(x.to(memory_format=torch.channels_last)).contiguous()


class Checkpointed(Tower):
    def __init__(self, layer, reentrant):
        super().__init__(layer)
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(lambda y: torch.tanh(self.layer(y)), x * 1.0, use_reentrant=self.reentrant)


def real(*shape):
    return lambda: torch.randn(B, *shape, dtype=torch.float64, requires_grad=True)


def norm(layer):
    """With weights that are neither 0 nor 1."""
    for parameter in layer.parameters():
        parameter.data = torch.linspace(-0.5, 1.5, parameter.numel()).view_as(parameter)
    return layer


def loss_of(model, x):
    """A sum over samples of something different for each."""
    y = model(x).flatten(1)
    return (y * torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)).sum(1).exp().sum()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model, x, *more):
    """Plain gradients, by the backward that reentrant checkpointing insists on."""
    loss_of(model, x).backward()
    wanted = [*trained(model), *more]
    grads = [w.grad for w in wanted]
    for w in wanted:
        w.grad = None
    return grads


def one_by_one(model, x, directions):
    """The (B, K) dots of every parameter, by a separate backward for every sample."""
    rows = []
    for i in range(len(x)):
        grads = gradients(model, x[i : i + 1])
        rows.append([(d * g).flatten(1).sum(1) for g, d in zip(grads, directions.values(), strict=True)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def directions_for(model, sets=3):
    return {p: torch.randn(sets, *p.shape, dtype=p.dtype) for p in trained(model)}


def size(model, x, directions):
    """|g_i||D| summed: what errors of a dot are relative to."""
    grads = gradients(model, x)
    return [g.norm() * d.norm() + 1e-30 for g, d in zip(grads, directions.values(), strict=True)]


def tapped(model, x, directions, late=False, **options):
    """The dots by parameter of one scored backward, `late` by directions that come after it."""
    coverage = cover(model, trained(model))
    taps = Taps(coverage, list(coverage.scored.values()))
    with taps.samples(B, None if late else directions, **options):
        loss_of(model, x).backward()
    return Taps.contract(taps.kept(), directions) if late else taps.dots()


def assert_agrees(model, x, tolerance, late=False, sets=3, **options):
    """Taps' dots are those of single samples, their gradients those of autograd (unless `gradients=False`: none)."""
    model.zero_grad()
    directions = directions_for(model, sets)
    expected, sizes = one_by_one(model, x, directions), size(model, x, directions)
    x.grad = None
    plain = gradients(model, x, *([x] if x.requires_grad else []))

    dots = tapped(model, x, directions, late, **options)
    for parameter, truth, scale in zip(directions, expected, sizes, strict=True):
        assert ((dots[parameter] - truth).abs().max() / scale) < tolerance
    ours = [p.grad for p in directions] + ([x.grad] if x.requires_grad else [])
    for gradient, theirs in zip(ours, plain, strict=True):
        if gradient is None:
            assert options == {"gradients": False}
        else:
            assert (gradient - theirs).norm() <= max(tolerance / 3, 1e-10) * theirs.norm()


def assert_autocast_agrees(model, x):
    """Under bfloat16 the dots belong to the rounded gradients: their sum is <.grad, D> to bfloat16's precision."""
    directions = directions_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        dots = tapped(model, x, directions)
    for parameter, D_k in directions.items():
        total, whole = dots[parameter].sum(0), (D_k * parameter.grad).flatten(1).sum(1)
        assert (total - whole).abs().max() < 1e-2 * parameter.grad.norm() * D_k.norm()


def in_dtype(make_model, make_input, dtype):
    """A model and an input that wants a gradient where it can, the same ones every time."""
    torch.manual_seed(0)
    model, x = make_model().to(dtype), make_input()
    return model, (x.to(dtype).detach().requires_grad_() if x.is_floating_point() else x)
