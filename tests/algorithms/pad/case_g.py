"""The reference case of the matching gradient: a 2-block ConvNet of width 16 on twelve images of 16x16."""

import math

import torch
from torch import nn

from ghostgram.algorithms.pad import mask
from ghostgram.algorithms.pad.convnet import ConvNet, initialised
from ghostgram.algorithms.pad.flat import Flat
from ghostgram.algorithms.pad.inner import Problem

IMAGES, CLASSES, BATCH, BETA, ALPHA = 12, 4, 5, 0.02, 0.5


def rotated_and_contrasted(step, images, indices):
    """A rotation and a contrast that are an image's own, the same in every step."""
    angles = indices.to(images.dtype) * 0.1 - 0.5
    zero = torch.zeros_like(angles)
    rows = [torch.stack([angles.cos(), -angles.sin(), zero], 1), torch.stack([angles.sin(), angles.cos(), zero], 1)]
    grid = nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=True)
    turned = nn.functional.grid_sample(images, grid, align_corners=True)
    mean = turned.mean((1, 2, 3), keepdim=True)
    return (turned - mean) * (0.6 + 0.07 * indices.to(images.dtype))[:, None, None, None] + mean


def batches(step):
    """Sweeps over permutations of the set, without replacement; the last of a sweep is short."""
    per_sweep = math.ceil(IMAGES / BATCH)
    sweep, part = divmod(step, per_sweep)
    return torch.randperm(IMAGES, generator=torch.Generator().manual_seed(sweep))[BATCH * part : BATCH * (part + 1)]


def net(dtype, act, number=0):
    made = initialised(lambda: ConvNet(3, CLASSES, 16, 2, 16), 1, "case g", (number,)).to(dtype)
    for block in made.blocks:
        block.act = act()
    return made


def problem(steps, dtype=torch.float64, act=nn.ReLU, masked=None, momentum=0.0, move=0.1):
    """From initial weights to others near them, as an expert's would be."""
    student, other = (net(dtype, act, number) for number in range(2))
    flat = Flat(student)
    start = flat.vector(student)
    target = start + move * flat.vector(other)
    chosen = masked or mask.depth(ALPHA)
    return Problem(flat, start, target, chosen, steps, batches, rotated_and_contrasted, momentum)


def synthetic(dtype=torch.float64):
    """Images and label logits."""
    chance = torch.Generator().manual_seed(3)
    images = torch.randn(IMAGES, 3, 16, 16, generator=chance, dtype=torch.float64)
    labels = 2 * torch.randn(IMAGES, CLASSES, generator=chance, dtype=torch.float64)
    return images.to(dtype), labels.to(dtype)


def relative(got, expected):
    """The error in units of the expected norm."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def worst(got, expected):
    """The largest relative error of the loss and of the gradients that both have."""
    parts = [(got.images, expected.images), (got.labels, expected.labels), (got.beta, expected.beta)]
    loss = abs(got.loss - expected.loss) / expected.loss
    return max(loss, *(relative(*part) for part in parts if part[0] is not None and part[1] is not None))
