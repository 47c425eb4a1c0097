"""Models of images and volumes, written out, and Hugging Face's ViT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks import Bottleneck, Checkpointable, ConvNeXtBlock, MixerBlock
from zoo.entry import CLASSES, Entry, real
from zoo.language import hugging_face


class ResNet(Checkpointable):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList(
            [Bottleneck(8, 16, stride=2, groups=2), Bottleneck(16, 16, dilation=2), Bottleneck(16, 24, groups=4)]
        )
        self.head = nn.Linear(24, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(pixel_values), 2)
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(x.mean((2, 3)))


class ConvNeXt(Checkpointable):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.stem_norm = nn.LayerNorm(8)
        self.blocks = nn.ModuleList([ConvNeXtBlock(8), ConvNeXtBlock(8)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(pixel_values).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(self.norm(x.mean((2, 3))))


class UNet(Checkpointable):
    """Down, through and up again by a transposed convolution beside a skip connection; a class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU())
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(12, 12, 3, padding="same"), nn.GroupNorm(3, 12), nn.SiLU())
        self.up = nn.ConvTranspose2d(12, 8, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.leave = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU())
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.enter(pixel_values)
        y = self.up(self.run(self.middle, self.down(x)))
        y = self.leave(torch.cat([x, y], 1))
        return self.head(y).permute(0, 2, 3, 1)


class Volumes(Checkpointable):
    """3-D convolutions, one of them transposed, and 3-D instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv3d(1, 6, 3, padding=(0, 1, 1))
        self.block = nn.Sequential(
            nn.InstanceNorm3d(6, affine=True), nn.ReLU(), nn.Conv3d(6, 8, 2, stride=(1, 2, 2), groups=2), nn.ReLU()
        )
        self.up = nn.ConvTranspose3d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, volume: Tensor) -> Tensor:
        x = self.run(self.block, self.enter(volume))
        return self.head(F.relu(self.up(x)).mean((2, 3, 4)))


class Style(Checkpointable):
    """An image-to-image net: reflected borders, instance norm, PReLU, nearest-neighbour upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect")
        self.residual = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.InstanceNorm2d(8, affine=True), nn.PReLU(8)
        )
        self.norm, self.prelu = nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.PReLU()
        self.head = nn.Conv2d(8, CLASSES, 3, padding=1, padding_mode="replicate")

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.prelu(self.norm(self.enter(pixel_values)))
        x = x + self.run(self.residual, x)
        return self.head(F.interpolate(x, scale_factor=2)).permute(0, 2, 3, 1)


class Mixer(Checkpointable):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * 2 * 2, 12)
        self.blocks = nn.ModuleList([MixerBlock(16, 12), MixerBlock(16, 12)])
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = pixel_values.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3)
        x = self.patches(patches)
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(self.norm(x).mean((1, 2)))


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return hugging_face("ViTForImageClassification", image_size=8, patch_size=4, num_labels=CLASSES, **sizes)()


ENTRIES = [
    Entry("ViT", vit, real("pixel_values", 3, 8, 8)),
    Entry("ResNet with GroupNorm", ResNet, real("pixel_values", 3, 12, 12)),
    Entry("ConvNeXt", ConvNeXt, real("pixel_values", 3, 8, 8)),
    Entry("U-Net", UNet, real("pixel_values", 3, 8, 8, labels=(8, 8))),
    Entry("3-D convolutions", Volumes, real("volume", 1, 4, 6, 6)),
    Entry("style transfer", Style, real("pixel_values", 3, 8, 8, labels=(8, 8))),
    Entry("MLP-Mixer", Mixer, real("pixel_values", 3, 8, 8)),
]
