"""How good a small set of images is: fresh networks trained on it, and what they say of test images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ghostgram.algorithms.pad import keyed
from ghostgram.algorithms.pad.augment import Dsa
from ghostgram.algorithms.pad.convnet import initialised
from ghostgram.algorithms.pad.flat import Flat
from ghostgram.algorithms.pad.gradients import augmented, check_labelled, gradients, predictions, training
from ghostgram.algorithms.pad.several import spread

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
DROP = 0.1
"""What the rate is multiplied by once, half-way."""


@dataclass(frozen=True)
class Evaluation:
    """What fresh networks said of test images: everything else is computed from it.

    Attributes:
        predictions: (nets, n) int64 classes.
        labels: (n,) int64, the true ones.
    """

    predictions: NDArray[np.int64]
    labels: NDArray[np.int64]

    @property
    def accuracies(self) -> NDArray[np.float64]:
        """(nets,) the share of images that each net is right about."""
        shares: NDArray[np.float64] = (self.predictions == self.labels).mean(axis=1)
        return shares

    @property
    def mean(self) -> float:
        """Of the accuracies."""
        return float(self.accuracies.mean())

    @property
    def std(self) -> float:
        """Their standard deviation over nets, with nets - 1 in the denominator; NaN of one net."""
        return float(self.accuracies.std(ddof=1)) if len(self.predictions) > 1 else math.nan


def evaluate(
    make_model: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    beta: float,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    nets: int = 5,
    epochs: int = 1001,
    batch: int = 128,
    augment: Dsa | None = None,
    seed: int = 0,
    group: int | None = None,
    workers: int = 1,
) -> Evaluation:
    """Trains fresh networks on a set of images and tests them, once each, with their final weights.

    A step is torch's SGD, momentum 0.9 and weight decay 5e-4, at the rate beta. After the pass with index
    (epochs - 1) // 2 + 1, 501 of 1001, the rate is multiplied by 0.1 and the momentum starts from 0 again. A pass sees
    every image once, in an order of its own; the last batch may be smaller. Test images are not augmented. Initial
    weights, orders and augmentations of net i are functions of (seed, i).

    Args:
        make_model: Makes a network on the CPU, its weights drawn by torch; float32.
        images: (n, C, H, W) float32. Their device is the one trained on.
        labels: (n, classes) floating point logits, whose softmax is the target, or (n,) int64 classes.
        beta: The learning rate; of a distilled set the learned one.
        test_images: (m, C, H, W) float32, whitened as the images are.
        test_labels: (m,) int64.
        nets: How many.
        epochs: Passes over the images.
        batch: Images of a step.
        augment: Augmentation of every batch; drawn from its stream's name with " evaluation" added.
        seed: Any integer.
        group: Nets trained at once, one `vmap` for all; by default 1 on a CPU, all on a GPU. It changes results by
            rounding only.
        workers: Processes that share the nets, each with an equal share of this one's threads; on a CPU only. They are
            spawned: a script that gets here has to be guarded by `if __name__ == "__main__"`.

    Raises:
        TypeError: images, labels or the model have another dtype, or make_model cannot be pickled for workers.
        ValueError: An argument is out of its range, or shapes do not fit.
        RuntimeError: A worker died.

    Warns:
        UserWarning: Networks ended with weights that are not finite: their accuracies say nothing but that.

    Cost:
        nets x epochs forwards and backwards of every image, and nets forwards of every test image.

    Source:
        The evaluation that MTT (arXiv 2203.11932), DATM (2310.05773) and PAD (2408.03360) share.
    """
    together = (1 if images.device.type == "cpu" else nets) if group is None else group
    named = {"nets": nets, "epochs": epochs, "batch": batch, "group": together, "workers": workers}
    for name, value in named.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta: expected a positive number, got {beta}")
    if workers > 1 and images.device.type != "cpu":
        raise ValueError(f"workers: expected 1 on {images.device}, where group trains nets at once, got {workers}")
    flat = Flat(initialised(make_model, seed, "evaluation", (0,)).to(images.device))
    soft = labels.ndim == 2
    classes = check_labelled(flat, images, labels.argmax(1) if soft else labels)
    if soft and (labels.shape[1] != classes or not labels.isfinite().all()):
        raise ValueError(f"labels: expected finite logits of {classes} classes, got shape {tuple(labels.shape)}")
    check_labelled(flat, test_images, test_labels, "test_")
    targets = labels.to(images.dtype).softmax(1) if soft else labels
    drawn = None if augment is None else replace(augment, stream=f"{augment.stream} evaluation")
    fresh = _Fresh(make_model, images, targets, beta, test_images, epochs, batch, drawn, seed)
    groups = [range(first, min(first + together, nets)) for first in range(0, nets, together)]
    found = np.concatenate(spread(fresh.predictions, groups, workers))
    return Evaluation(found, test_labels.cpu().numpy())


@dataclass(frozen=True)
class _Fresh:
    """Everything that the predictions of a fresh network depend on."""

    make_model: Callable[[], nn.Module]
    images: Tensor
    targets: Tensor
    beta: float
    test_images: Tensor
    epochs: int
    batch: int
    augment: Dsa | None
    seed: int

    def predictions(self, nets: Sequence[int]) -> NDArray[np.int64]:
        """(nets, m): what a group of networks says of the test images."""
        device = self.images.device
        models = [initialised(self.make_model, self.seed, "evaluation", (net,)).to(device) for net in nets]
        flat = Flat(models[0])
        weights = torch.stack([flat.vector(model) for model in models])
        velocity, rate = torch.zeros_like(weights), self.beta
        with training(flat, device, self.seed, "evaluation noise", (nets[0],)):
            for epoch in range(self.epochs):
                for step, rows in enumerate(torch.split(self._order(nets, epoch), self.batch, dim=1)):
                    x = augmented(self.augment, [(net, epoch, step) for net in nets], self.images, rows)
                    slope = gradients(flat, weights, x, self.targets[rows.to(device)]).gradients
                    velocity = MOMENTUM * velocity + slope + WEIGHT_DECAY * weights
                    weights = weights - rate * velocity
                if epoch == (self.epochs - 1) // 2 + 1:
                    velocity, rate = torch.zeros_like(weights), DROP * self.beta
        if lost := [net for net, w in zip(nets, weights, strict=True) if not w.isfinite().all()]:
            warnings.warn(f"beta: at {self.beta} the weights of nets {lost} are not finite in the end", stacklevel=2)
        said = torch.stack([predictions(flat, w, self.test_images) for w in weights])
        return said.cpu().numpy()

    def _order(self, nets: Sequence[int], epoch: int) -> Tensor:
        n = len(self.images)
        orders = [keyed.permutation(self.seed, "evaluation batches", (net, epoch), n) for net in nets]
        return torch.from_numpy(np.stack(orders))
