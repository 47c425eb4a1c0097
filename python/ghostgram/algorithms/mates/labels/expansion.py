"""What all first-order labels do: the references' losses to first order along the step, once a stage, then batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ghostgram.algorithms.mates.labels.backend import Influence, levels
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView, wide
from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.algorithms.mates.labels.task import Task

BATCH = 16
"""Documents of one pass, whose activations are held at once."""

Gradients = dict[nn.Parameter, Tensor]
"""parameter -> (R, *shape), one gradient for each reference."""


class Expansion(NamedTuple):
    """The references' losses to first order around theta_null."""

    base_loss: Tensor
    """(R,) float64: L_r(theta)."""
    null_gain: Tensor
    """(R,) float64: L_r(theta) - L_r(theta_null), what momentum and weight decay do by themselves."""
    gradients: Gradients
    """Those of L_r at theta_null."""


class FirstOrderLabels(ABC):
    """What the first-order backends have in common. A document's numbers do not depend on its batch.

    Args:
        model: The model as it is trained.
        view: Its optimizer's step.
        references: The R references.
        task: What a document is to the model.
        batch: Documents of one pass.
    """

    name: str
    shardable: ClassVar[bool] = False
    """Whether it labels a model that `fully_shard` has spread over processes, all of which read every document."""

    def __init__(
        self,
        model: nn.Module,
        view: OptimizerView,
        references: Sequence[Reference],
        task: Task,
        *,
        batch: int = BATCH,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch: expected at least 1 document, got {batch}")
        self.view, self.references, self.task, self.batch = view, list(references), task, batch
        self.model = view.model
        self._parameters = list(view.names)
        self._weights = sum(p.numel() for p in self._parameters)

    def why_not(self) -> str | None:
        """The optimizer's step has no closed form, weights may not be sharded, or a pass over one document fails."""
        if reason := self.view.why_not():
            return reason
        if self.view.ranks.sharded and not self.shardable:
            return "the weights are sharded over processes"
        first = self.references[0]
        try:
            self._try(first.ids[:1], first.mask[:1])
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def prepare(self) -> None:
        """The references' losses, and their gradients at theta_null."""
        self.base_loss, self.null_gain, gradients = expand(self.view, self.references, self.task)
        self._take(gradients)

    def influence(self, ids: Tensor, mask: Tensor) -> Influence:
        """The influence of documents (n, T), each as if it were the only one."""
        batches = zip(torch.split(ids, self.batch), torch.split(mask, self.batch), strict=True)
        found = joined(self._of_batch(*each) for each in batches)
        return found._replace(values=found.values + self.null_gain)

    @abstractmethod
    def flops(self, tokens: int) -> float:
        """What the influence of one document of so many tokens costs."""

    @abstractmethod
    def _try(self, ids: Tensor, mask: Tensor) -> None:
        """A pass over documents as `influence` makes it."""

    @abstractmethod
    def _take(self, gradients: Gradients) -> None:
        """Keeps what the values are made of, of the references' gradients."""

    @abstractmethod
    def _of_batch(self, ids: Tensor, mask: Tensor) -> Influence:
        """The influence without the null gain."""


def joined(parts: Iterable[Influence]) -> Influence:
    """Documents one after another."""
    return Influence(*(torch.cat(each) for each in zip(*parts, strict=True)))


def expand(view: OptimizerView, references: Sequence[Reference], task: Task) -> Expansion:
    """The references' gradients at theta_null, where the step leads without any document.

    Cost:
        6 P R_t FLOPs for R_t reference tokens, and R copies of the trainable weights.
    """
    base_loss, null_gain = levels(view, references, task)
    with view.at_null():
        each = [reference.gradient(view.model, task) for reference in references]
    gradients = {p: torch.stack([wide(gradient.pop(p)) for gradient in each]) for p in view.names}
    return Expansion(base_loss, null_gain, gradients)


def first_documents(references: Sequence[Reference], count: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, mask) of the first examples of each reference, about `count` of them together, so many at a time."""
    of_each = -(-count // len(references))
    for r in references:
        yield from zip(torch.split(r.ids[:of_each], batch), torch.split(r.mask[:of_each], batch), strict=True)
