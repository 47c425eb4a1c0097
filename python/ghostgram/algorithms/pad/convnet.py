"""The student of dataset distillation: a plain stack of convolutions, without buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostgram.algorithms.pad import keyed


class ConvNet(nn.Module):
    """`depth` blocks of convolution, norm, ReLU and pooling, then a linear layer.

    A block is a 3x3 convolution of stride 1 and padding 1 with bias, GroupNorm of one channel a group (affine, eps
    1e-5), ReLU, and the average over 2x2. Images of 28x28 are padded to 32x32 by the first convolution (padding 3).
    Its usual forms are D3 (depth 3) for 32x32 and D4 for 64x64. Weights are initialised as torch does it.

    Args:
        channels: Of the images.
        classes: How many logits.
        width: Channels of every block.
        depth: How many blocks.
        size: Height and width of the images.

    Raises:
        ValueError: A number is below 1, or some norm would see maps of 1x1, whose norm is constant.

    Cost:
        9 width size^2 (channels + width / 4 + width / 16 + ...) multiplications and additions for an image's forward.
        Parameters: width (9 channels + 3) + (depth - 1) width (9 width + 3) + classes (features + 1).

    Source:
        Gidaris and Komodakis (arXiv 1804.09458); the student of DC (arXiv 2006.05929) and of all that follow it.
    """

    def __init__(self, channels: int, classes: int, width: int = 128, depth: int = 3, size: int = 32) -> None:
        super().__init__()
        for name, value in [("channels", channels), ("classes", classes), ("width", width), ("depth", depth)]:
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        padding = 3 if size == 28 else 1
        seen = size + 2 * padding - 2  # by the first norm; pooling halves it for every next one
        if seen >> (depth - 1) < 2:
            raise ValueError(f"depth: expected every norm to see maps of 2x2 or more, got depth {depth} at size {size}")
        self.blocks = nn.Sequential(
            _block(channels, width, padding), *(_block(width, width, 1) for _ in range(depth - 1))
        )
        self.fc = nn.Linear(width * (seen >> depth) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, size, size) -> (n, classes) logits."""
        logits: Tensor = self.fc(self.blocks(x).flatten(1))
        return logits


def _block(channels: int, width: int, padding: int) -> nn.Sequential:
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(channels, width, 3, padding=padding))
    block.add_module("norm", nn.GroupNorm(width, width))
    block.add_module("act", nn.ReLU())
    block.add_module("pool", Halving())
    return block


class Halving(nn.Module):
    """The mean over 2x2 pixels, as `AvgPool2d(2)`; a last odd row or column is left out.

    On a CPU it is a product of every two rows with a matrix that has four entries of 1/4 in a column: torch pools there
    without vector instructions (docs/algorithms/pad_experts.md has what a gradient gains).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, C, H // 2, W // 2)."""
        if not _in_pairs(x):
            return F.avg_pool2d(x, 2)
        n, channels, height, width = x.shape
        halved: Tensor = x.reshape(n, channels, height // 2, 2 * width) @ _means(width, x)
        return halved

    def transposed(self, g: Tensor, x: Tensor) -> Tensor:
        """The gradient by x, from that by the output."""
        if not _in_pairs(x):
            below: Tensor = torch.ops.aten.avg_pool2d_backward(g, x, [2, 2], [2, 2], [0, 0], False, True, None)
            return below
        return (g @ _means(x.shape[3], x).T).view(x.shape)


def _in_pairs(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.shape[2] % 2 == x.shape[3] % 2 == 0


def _means(width: int, like: Tensor) -> Tensor:
    """(2 width, width / 2): from two rows, one after the other, to the means over 2x2."""
    return torch.eye(width // 2, dtype=like.dtype).repeat_interleave(2, 0).repeat(2, 1) / 4


def initialised(make: Callable[[], nn.Module], seed: int, stream: str, counters: Sequence[int]) -> nn.Module:
    """A model whose random weights are those of a key; what torch draws elsewhere is not affected.

    Args:
        make: Makes the model on the CPU, drawing by torch alone, as the constructors of `torch.nn` do.
        seed: Any integer.
        stream: What the model is for, such as "expert".
        counters: Which of them.

    Returns:
        What make returns: the same weights for the same key.
    """
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(keyed.generator(seed, stream, counters).get_state())
        return make()
