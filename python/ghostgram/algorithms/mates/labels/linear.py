"""The step of the optimizer made linear in the gradient, and what labels that take it so have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ghostgram.algorithms.mates.labels.expansion import BATCH, FirstOrderLabels, Gradients, first_documents
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView, wide
from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.algorithms.mates.labels.task import Task
from ghostgram.taps.sharding import parts_of, rows_of
from ghostgram.training.aside import evaluating, taken_gradients

TYPICAL = 32
"""How many documents' gradients say how large an entry of one is."""


class Slopes(NamedTuple):
    """The step's derivative at gradient 0, its sign turned."""

    by_parameter: dict[nn.Parameter, Tensor]
    """parameter -> slope, of its shape; a scalar tensor for SGD."""
    capped_fraction: float
    """The share of all entries whose slope was cut down to the cap."""


class LinearLabels(FirstOrderLabels):
    """What the backends of (B) have in common: the directions `w_r = slope o grad L_r(theta_null)`.

    Args:
        model: The model as it is trained.
        view: Its optimizer's step.
        references: The R references.
        task: What a document is to the model.
        vocab: What becomes of the vocabulary matrices, where slopes are least to be trusted: "frozen" is the formula as
            it is, "drop" leaves them out, "adam_rows" takes AdamW's step as it is on the rows of the document's own
            tokens. None for the first that the backend knows.
        capped: Whether slopes are capped (`slopes`).
        batch: Documents of one pass.
    """

    vocabs: ClassVar[tuple[str, ...]] = ("frozen", "drop")
    """What `vocab` may be, the default first."""
    capped_fraction = 0.0
    """The share of slopes that `prepare` has cut down to the cap."""

    def __init__(
        self,
        model: nn.Module,
        view: OptimizerView,
        references: Sequence[Reference],
        task: Task,
        *,
        vocab: str | None = None,
        capped: bool = True,
        batch: int = BATCH,
    ) -> None:
        vocab = self.vocabs[0] if vocab is None else vocab
        if vocab not in self.vocabs:
            raise ValueError(f"vocab: expected one of {self.vocabs} for {self.name} labels, got {vocab!r}")
        super().__init__(model, view, references, task, batch=batch)
        self.vocab, self.capped = vocab, capped

    def _take(self, gradients: Gradients) -> None:
        found, self.capped_fraction = slopes(self.view, self.references, self.task, capped=self.capped)
        special = set() if self.vocab == "frozen" else vocabulary(self.view, self.task, self.references[0])
        dropped = special if self.vocab == "drop" else set()
        self._directions = {p: parts_of(g * found[p], p) for p, g in gradients.items() if p not in dropped}
        # A step that is linear in the gradient has nothing beyond.
        rows = special if self.vocab == "adam_rows" and not self.view.linear else set()
        self._by_row = {p: (gradients[p], found[p], rows_of(p)) for p in self._parameters if p in rows}


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
    cut_of_all = float(view.ranks.over_elements(torch.tensor(cut)))
    return Slopes(found, cut_of_all / sum(p.numel() for p in view.names))


def typical_entries(view: OptimizerView, references: Sequence[Reference], task: Task) -> dict[nn.Parameter, float]:
    """parameter -> root mean square of the nonzero entries of single documents' clipped gradients; 0 for none."""
    parameters = list(view.names)
    squares, counts = (torch.zeros(len(parameters), dtype=torch.float64) for _ in range(2))
    with evaluating(view.model, parameters), view.ranks.aside(), torch.enable_grad():
        for ids, mask in first_documents(references, TYPICAL, 1):
            task.losses(view.model, ids, mask).sum().backward()  # type: ignore[no-untyped-call]
            gradients = [wide(g) for g in taken_gradients(parameters).values()]
            each = view.ranks.over_elements(torch.stack([g.square().sum() for g in gradients]).double().cpu())
            squares += each * view.clip_factors(each.sum().sqrt()) ** 2
            counts += torch.stack([g.count_nonzero() for g in gradients]).double().cpu()
    counts = view.ranks.over_elements(counts)
    return dict(zip(parameters, (squares / counts.clamp(min=1)).sqrt().tolist(), strict=True))


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
