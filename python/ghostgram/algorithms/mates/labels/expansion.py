"""What all first-order labels do: the references' losses to first order along the step, once a stage, then batches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ghostgram.algorithms.mates.labels.backend import Influence, levels
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView, wide
from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.algorithms.mates.labels.task import Task
from ghostgram.training.aside import evaluating, taken_gradients

BATCH = 16
"""Documents of one pass, whose activations are held at once."""
TYPICAL = 32
"""How many documents' gradients say how large an entry of one is."""


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


class Slopes(NamedTuple):
    """The step's derivative at gradient 0, its sign turned."""

    by_parameter: dict[nn.Parameter, Tensor]
    """parameter -> slope, of its shape; a scalar tensor for SGD."""
    capped_fraction: float
    """The share of all entries whose slope was cut down to the cap."""


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
    capped_fraction = 0.0
    """The share of slopes that `prepare` has cut down to the cap."""

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
        """The optimizer's step has no closed form, weights are sharded, or a pass over one document fails."""
        if reason := self.view.why_not():
            return reason
        if self.view.ranks.sharded:
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


def slopes(view: OptimizerView, references: Sequence[Reference], task: Task, *, capped: bool) -> Slopes:
    """The slopes of the step, by which a clipped gradient is multiplied in its linear form.

    Where the second moment is far below the square of one document's gradient, the step itself has long saturated. The
    cap is the slope at which an entry of typical size saturates:

        |slope| <= eta (1-b1) sqrt(bc2) / (bc1 sqrt(1-b2) gamma),

    gamma being the root mean square, over the parameter's nonzero entries, of clipped gradients of single documents;
    the first of the references stand for documents.

    Args:
        view: The optimizer's step.
        references: Give the documents.
        task: What a document is to the model.
        capped: Whether slopes are capped; SGD's, whose step does not saturate, never are.
    """
    typical = {} if view.linear or not capped else typical_entries(view, references, task)
    found, cut = {}, 0
    for p in view.names:
        found[p] = view.slope(p)
        if typical.get(p):
            eta, b1, b2, _, bc1, bc2 = view.scalars(p)
            cap = eta * (1 - b1) * math.sqrt(bc2) / (bc1 * math.sqrt(1 - b2) * typical[p])
            cut += int((found[p].abs() > cap).sum())
            found[p] = found[p].clamp(-cap, cap)
    return Slopes(found, cut / sum(p.numel() for p in view.names))


def typical_entries(view: OptimizerView, references: Sequence[Reference], task: Task) -> dict[nn.Parameter, float]:
    """parameter -> root mean square of the nonzero entries of single documents' clipped gradients; 0 for none."""
    parameters = list(view.names)
    squares, counts = (torch.zeros(len(parameters), dtype=torch.float64) for _ in range(2))
    with evaluating(view.model, parameters), view.ranks.aside(), torch.enable_grad():
        for ids, mask in first_documents(references, TYPICAL, 1):
            task.losses(view.model, ids, mask).sum().backward()  # type: ignore[no-untyped-call]
            gradients = [wide(g) for g in taken_gradients(parameters).values()]
            each = torch.stack([g.square().sum() for g in gradients]).double().cpu()
            squares += each * view.clip_factors(each.sum().sqrt()) ** 2
            counts += torch.stack([g.count_nonzero() for g in gradients]).double().cpu()
    return dict(zip(parameters, (squares / counts.clamp(min=1)).sqrt().tolist(), strict=True))


def first_documents(references: Sequence[Reference], count: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, mask) of the first examples of each reference, about `count` of them together, so many at a time."""
    of_each = -(-count // len(references))
    for r in references:
        yield from zip(torch.split(r.ids[:of_each], batch), torch.split(r.mask[:of_each], batch), strict=True)


def vocabulary(view: OptimizerView, task: Task, reference: Reference) -> set[nn.Parameter]:
    """The trainable parameters with a row for every token: tables that tokens are looked up in, and the output layer.

    They are found by watching one document: a table's input are its tokens, and the output layer is the last one called
    that has a row, and an output feature, for every entry of such a table.
    """
    ids, mask = reference.ids[:1], reference.mask[:1]
    tables: list[nn.Module] = []
    layers: list[tuple[nn.Module, int]] = []

    def watch(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        seen = inputs[0] if inputs else None
        if isinstance(module, nn.Embedding):
            if isinstance(seen, Tensor) and seen.dim() == 2 and torch.equal(seen.cpu(), ids[:, : seen.shape[1]]):
                tables.append(module)
        elif isinstance(output, Tensor) and output.dim() > 1 and any(True for _ in module.parameters(recurse=False)):
            layers.append((module, output.shape[-1]))

    hooks = [module.register_forward_hook(watch) for module in view.model.modules()]
    try:
        with evaluating(view.model, []), view.ranks.aside(), torch.no_grad():
            task.losses(view.model, ids, mask)
    finally:
        for hook in hooks:
            hook.remove()
    entries = {len(p) for table in tables for p in table.parameters(recurse=False)}
    heads = [module for module, features in layers if features in entries][-1:]
    held = [p for module in (*tables, *heads) for p in module.parameters(recurse=False)]
    return {p for p in held if p in view.names and len(p) in entries}
