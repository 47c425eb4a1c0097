"""What dots cost a convolution: its weight gradient with them, by either way, beside torch's weight gradient alone."""

from __future__ import annotations

import pytest
import torch
from interleave import interleaved
from torch import nn

from ghostgram.taps import conv

LAYERS = {
    "3x3, 64 at 56x56": (nn.Conv2d(64, 64, 3, padding=1), (16, 64, 56, 56)),
    "3x3, 128 at 28x28": (nn.Conv2d(128, 128, 3, padding=1), (16, 128, 28, 28)),
    "3x3, 256 at 14x14": (nn.Conv2d(256, 256, 3, padding=1), (16, 256, 14, 14)),
    "3x3, 512 at 7x7": (nn.Conv2d(512, 512, 3, padding=1), (16, 512, 7, 7)),
    "16x16 patches to 768": (nn.Conv2d(3, 768, 16, 16), (16, 3, 224, 224)),
    "depthwise 3x3, 256 at 28x28": (nn.Conv2d(256, 256, 3, padding=1, groups=256), (16, 256, 28, 28)),
}


@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("name", LAYERS)
def bench_conv(benchmark, record, name, directions):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    x, weight = torch.randn(shape), layer.weight.detach()
    D, b = torch.randn(directions, *weight.shape), torch.randn_like(layer(x))
    geometry = conv.Geometry(layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups)

    def gradient():
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(b, x, weight, None, *geometry, mask)[1]

    def projected():
        return gradient(), conv._projected(x, b, geometry, D)

    def unfolded():
        return conv._unfolded(x, b, geometry, D, True)

    (grad, dots), (grad_of_windows, dots_of_windows) = projected(), unfolded()
    torch.testing.assert_close(grad_of_windows, grad, rtol=1e-4, atol=1e-4 * grad.norm())
    torch.testing.assert_close(dots_of_windows, dots, rtol=1e-4, atol=1e-4 * dots.norm())

    by_windows = conv.unfolds(D, layer.groups, gradient=True)
    ways = {"gradient": gradient, "projected": projected, "unfolded": unfolded}
    seconds = interleaved(benchmark, ways.pop("unfolded" if by_windows else "projected"), ways, rounds=9, cold=False)
    other = seconds.get("projected" if by_windows else "unfolded", 0.0)
    record(
        layer=name,
        directions=directions,
        way="unfolded" if by_windows else "projected",
        ms=1e3 * seconds["ours"],
        torch_gradient_ms=1e3 * seconds["gradient"],
        ratio_to_gradient=seconds["ours"] / seconds["gradient"],
        other_way_to_gradient=other / seconds["gradient"],
    )
