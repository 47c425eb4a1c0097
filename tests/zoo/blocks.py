"""What the zoo's own models are made of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Checkpointable(nn.Module):
    """A model whose blocks can be computed again in backward; `reentrant` says how, None that they are not."""

    reentrant: bool | None = None

    def run(self, block: nn.Module, x: Tensor, *more: Tensor) -> Tensor:
        if self.reentrant is None:
            return block(x, *more)
        return checkpoint(block, x, *more, use_reentrant=self.reentrant)


class Bottleneck(nn.Module):
    """ResNeXt's block with GroupNorm: grouped and dilated 3x3, a 1x1 shortcut where shapes change, ReLU in place."""

    def __init__(self, channels: int, out: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> None:
        super().__init__()
        inner = out // 2
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm1 = nn.GroupNorm(2, inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, dilation, dilation, groups, bias=False)
        self.norm2 = nn.GroupNorm(2, inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.norm3 = nn.GroupNorm(2, out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Identity()
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.GroupNorm(2, out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        y += self.downsample(x)
        return self.relu(y)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm and MLP with channels last, and LayerScale's bare parameter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))) * self.scale
        return x + y.permute(0, 3, 1, 2)


class MixerBlock(nn.Module):
    """MLP-Mixer's block: one MLP over places, by way of a transpose, one over channels."""

    def __init__(self, places: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.places = nn.Sequential(nn.Linear(places, 2 * places), nn.GELU(), nn.Linear(2 * places, places))
        self.channels = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """X is (B, height, width, C): rows and columns of places stay axes of their own."""
        y = self.norm1(x).flatten(1, 2).transpose(1, 2)
        x = x + self.places(y).transpose(1, 2).reshape(x.shape)
        return x + self.channels(self.norm2(x))


class GatedBlock(nn.Module):
    """torch's RMSNorm before causal attention with one fused projection, and before a gated MLP (SwiGLU)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LoRA(nn.Module):
    """A frozen Linear and a trained update of low rank: y = W x + scale * B A x."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Linear(base.in_features, rank, bias=False)
        self.B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.B.weight, std=1 / math.sqrt(rank))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.B(self.A(x))


class Experts(nn.Module):
    """Experts that are layers of their own: each sees the tokens that the router sends to it, whoever they are of."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            y[chosen == index] = expert(x[chosen == index]).to(y.dtype)
        return x + weights.unsqueeze(-1) * y
