"""Mean gradients of several models of one layout at once, each at its own weights and on its own batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from ghostgram.algorithms.pad import keyed
from ghostgram.algorithms.pad.augment import Dsa
from ghostgram.algorithms.pad.flat import Flat

PIXELS = 2**15
"""Of one forward on a CPU, where the activations of more leave the caches: docs/algorithms/pad_experts.md."""

TOGETHER = 10
"""Models of one `vmap` on a GPU, by default."""


class Batch(NamedTuple):
    """What E models say of their batches."""

    gradients: Tensor
    """(E, P) of the mean loss."""
    losses: Tensor
    """(E,) mean cross-entropy."""
    logits: Tensor
    """(E, B, classes)"""


def check_labelled(flat: Flat, images: Tensor, labels: Tensor, which: str = "") -> int:
    """Refuses what a model cannot be trained or tested on; gives how many logits it has.

    Args:
        flat: The model's layout.
        images: (n, C, H, W) float32, finite.
        labels: (n,) int64, each a class that the model has a logit for.
        which: Stands before both names in messages, such as "test_".

    Raises:
        TypeError: A dtype differs.
        ValueError: A shape, a device or a value does.
    """
    x, y = f"{which}images", f"{which}labels"
    if images.dtype != torch.float32:
        raise TypeError(f"{x}: expected float32, got {images.dtype}")
    if images.ndim != 4 or not len(images):
        raise ValueError(f"{x}: expected shape (n, C, H, W) with n at least 1, got {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError(f"{x}: expected finite numbers, got {images[~images.isfinite()][0]}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{y}: expected int64, got {labels.dtype}")
    if labels.shape != images.shape[:1] or labels.device != images.device:
        expected, got = f"({len(images)},) on {images.device}", f"{tuple(labels.shape)} on {labels.device}"
        raise ValueError(f"{y}: expected shape {expected}, as {x}, got {got}")
    with torch.no_grad(), training(flat, images.device, 0, "check", ()):
        classes: int = flat.logits(flat.vector(flat.module), images[:2]).shape[1]
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise ValueError(f"{y}: expected classes from 0 to {classes - 1}, as the model has logits, got {wrong[0]}")
    return classes


def gradients(flat: Flat, weights: Tensor, images: Tensor, targets: Tensor) -> Batch:
    """The gradient of `1/B sum_i -<t_i, log_softmax(f(x_i; w))>` by w, for each of E models alone.

    One model is differentiated as any model is, over parts of the batch whose gradients add up. More go through `vmap`
    together: it spares a GPU launches, and costs a CPU time, where convolutions of several weights are slower ones.

    Args:
        flat: The models' layout; the module's mode is left as it is.
        weights: (E, P).
        images: (E, B, ...).
        targets: (E, B) int64 classes, or (E, B, classes) probabilities.
    """
    if len(weights) > 1:
        return _together(flat, weights, images, targets)
    at_once = _at_once(images[0])
    theta, total, logits = weights[0].detach().requires_grad_(), torch.zeros_like(weights[0]), []
    loss = weights.new_zeros(1)
    for x, y in zip(torch.split(images[0], at_once), torch.split(targets[0], at_once), strict=True):
        said = flat.logits(theta, x)
        part = F.cross_entropy(said, y, reduction="sum") / images.shape[1]
        total += torch.autograd.grad(part, theta)[0]
        loss += part.detach()
        logits.append(said.detach())
    return Batch(total[None], loss, torch.cat(logits)[None])


def _together(flat: Flat, weights: Tensor, images: Tensor, targets: Tensor) -> Batch:
    def loss(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits = flat.logits(theta, x)
        mean = F.cross_entropy(logits, y)
        return mean, (mean.detach(), logits.detach())

    found, (losses, logits) = vmap(grad(loss, has_aux=True))(weights, images, targets)
    return Batch(found, losses, logits)


def augmented(dsa: Dsa | None, counters: Sequence[Sequence[int]], images: Tensor, rows: Tensor) -> Tensor:
    """(E, B, C, H, W): the images of each model's rows (E, B), augmented by its counters and their numbers as ids."""
    taken = images[rows.to(images.device)]
    if dsa is None:
        return taken
    each = zip(counters, rows, taken, strict=True)
    return torch.stack([dsa.apply(dsa.draw(where, ids.numpy()), x) for where, ids, x in each])


def predictions(flat: Flat, theta: Tensor, images: Tensor) -> Tensor:
    """(n,) int64: the class of the largest logit of a model (P,), in eval mode."""
    flat.module.eval()
    with torch.no_grad():
        return torch.cat([flat.logits(theta, x).argmax(1) for x in torch.split(images, _at_once(images))])


def _at_once(images: Tensor) -> int:
    """Images of one forward."""
    pixels = PIXELS if images.device.type == "cpu" else 2**20
    return max(1, pixels // (images.shape[-2] * images.shape[-1]))


@contextmanager
def training(flat: Flat, device: torch.device, seed: int, stream: str, counters: Sequence[int]) -> Iterator[None]:
    """Train mode, and kernels and noise that give the same bits again.

    What a module draws by itself, as dropout does, comes from the key: global generators are put back. TF32 is off.
    """
    flat.module.train()
    devices = [device] if device.type == "cuda" else []
    fixed = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    precision = torch.get_float32_matmul_precision()
    with torch.random.fork_rng(devices=devices), fixed:
        torch.manual_seed(keyed.integer(seed, stream, counters, 0, 2**53))
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
