"""A model of the zoo, its batch, and its loss: every sample's share of a mean whose denominator is frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES, TOKENS, VOCABULARY, CLASSES, WIDTH = 4, 6, 37, 5, 16


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and what its outputs are compared with.

    Attributes:
        inputs: Keyword arguments of the model; the first dimension is the sample, or 1 when all samples share it.
        labels: (B, ...) class of every output.
        weights: (B, ...) weight of every output's cross-entropy. They hold the batch's denominator, so that one row's
            loss is this row's share of the batch's.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    weights: Tensor

    def rows(self, first: int, last: int) -> Batch:
        """Samples first to last - 1, with their weights unchanged."""
        inputs = {name: x if x.shape[0] == 1 else x[first:last] for name, x in self.inputs.items()}
        return Batch(inputs, self.labels[first:last], self.weights[first:last])


@dataclass(frozen=True)
class Entry:
    """One model of the zoo."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    batch_4d: Callable[[], Batch] | None = None
    """The same samples with two more axes between sample and features, where the architecture leaves them free."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Conditions that the model itself or torch's operators in it cannot meet, and why."""

    def build(self) -> nn.Module:
        """The model with the same random weights every time: no bias is 0, no norm's weight 1, nothing drops out."""
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.train()


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """(B,): each sample's share of the batch's loss."""
    outputs = model(**batch.inputs)
    logits = getattr(outputs, "logits", outputs)
    each = F.cross_entropy(logits.flatten(0, -2).float(), batch.labels.flatten(), reduction="none")
    return (each.view_as(batch.labels) * batch.weights).reshape(len(batch.labels), -1).sum(1)


def random_batch(classes: int, labels: tuple[int, ...], **inputs: Tensor) -> Batch:
    """Random labels, and the weights of a plain mean over all of them."""
    shape = (SAMPLES, *labels)
    return Batch(inputs, torch.randint(classes, shape), torch.full(shape, 1 / torch.Size(shape).numel()))


def text(labels: int | None = TOKENS, classes: int = VOCABULARY, **more: int) -> Callable[[], Batch]:
    """input_ids (B, T) with `labels` labels per sample, one when None; `more` names inputs of ids of other lengths."""

    def batch() -> Batch:
        torch.manual_seed(1)
        lengths = {"input_ids": TOKENS, **more}
        # From 2: ids 0 and 1 are some models' padding, which the condition "padding" is for.
        ids = {name: torch.randint(2, VOCABULARY, (SAMPLES, length)) for name, length in lengths.items()}
        return random_batch(classes, () if labels is None else (labels,), **ids)

    return batch


def real(name: str, *shape: int, labels: tuple[int, ...] = ()) -> Callable[[], Batch]:
    """One input of normally distributed numbers, (B, *shape), to be put into CLASSES classes."""

    def batch() -> Batch:
        torch.manual_seed(1)
        return random_batch(CLASSES, labels, **{name: torch.randn(SAMPLES, *shape)})

    return batch
