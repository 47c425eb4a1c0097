"""What is done to a model of the zoo before it is asked: the ways in which training differs from the textbook."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from zoo.blocks import Checkpointable
from zoo.entry import SAMPLES, TOKENS, Batch, Entry


@dataclass(frozen=True)
class Condition:
    """One condition; every part of it may be left as it is.

    Attributes:
        name: In tests and tables.
        why_not: Why a model cannot be put into this condition, or "".
        change: Changes the model itself, the one of the loop over samples too.
        recompute: Whether checkpoints are reentrant; None for no checkpointing. Never in the loop over samples.
        batch: Changes the batch.
        context: Around forward and backward.
        late: How dots are taken of directions that are known only after the backward; "" for directions known before.
        microbatches: The batch is cut into so many, each with a backward of its own.
        tolerance: Of the dots, relative to the largest sum of a sample's absolute terms.
        gradient_tolerance: Of .grad, relative to each parameter's gradient.
    """

    name: str
    why_not: Callable[[Entry, nn.Module], str] = lambda entry, model: ""
    change: Callable[[nn.Module], object] = lambda model: None
    recompute: bool | None = None
    batch: Callable[[Entry, Batch], Batch] = lambda entry, batch: batch
    context: Callable[[], AbstractContextManager] = nullcontext
    late: str = ""
    microbatches: int = 1
    tolerance: float = 1e-5
    gradient_tolerance: float = 1e-6


def takes(argument: str) -> Callable[[Entry, nn.Module], str]:
    """Whether a model of text has such an argument."""

    def why_not(entry: Entry, model: nn.Module) -> str:
        taken = {"input_ids", argument} <= inspect.signature(model.forward).parameters.keys()
        return "" if taken else f"it takes no input_ids, or no {argument}"

    return why_not


def with_inputs(change: Callable[[Tensor], Tensor]) -> Callable[[Entry, Batch], Batch]:
    return lambda entry, batch: replace(batch, inputs={name: change(x) for name, x in batch.inputs.items()})


def sliced(x: Tensor) -> Tensor:
    """Every second element of a larger tensor."""
    return torch.stack([x, x.flip(0)], -1)[..., 0]


def padded(entry: Entry, batch: Batch) -> Batch:
    """A mask that leaves samples of different lengths; where every token has a label, only what is kept has weight."""
    kept = torch.arange(TOKENS) < torch.tensor([TOKENS, 2, TOKENS - 1, 3]).unsqueeze(1)
    inputs = batch.inputs | {"attention_mask": kept.long()}
    of_tokens = batch.labels.shape == kept.shape and "decoder_input_ids" not in inputs
    return replace(batch, inputs=inputs, weights=kept / kept.sum() if of_tokens else batch.weights)


def positions(entry: Entry, batch: Batch) -> Batch:
    return replace(batch, inputs=batch.inputs | {"position_ids": torch.arange(TOKENS).unsqueeze(0)})


def as_many_tokens_as_samples(entry: Entry, batch: Batch) -> Batch:
    """So that an axis of positions may be taken for that of samples."""
    inputs = {name: x[:, :SAMPLES] for name, x in batch.inputs.items()}
    if batch.labels.dim() == 1:
        return replace(batch, inputs=inputs)
    return replace(batch, inputs=inputs, labels=batch.labels[:, :SAMPLES], weights=batch.weights[:, :SAMPLES])


def tie(model: nn.Module) -> None:
    model.get_output_embeddings().weight = model.get_input_embeddings().weight


def why_not_tied(entry: Entry, model: nn.Module) -> str:
    tables = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    if None in tables:
        return "it has no table of tokens and head to tie"
    first, last = (table.weight.shape for table in tables)
    return "" if first == last else "its head has another shape than its table of tokens"


def freeze(model: nn.Module) -> None:
    """Every third parameter: now a weight, now a bias, now a norm."""
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)


def why_not_checkpointed(entry: Entry, model: nn.Module) -> str:
    able = isinstance(model, Checkpointable) or getattr(model, "supports_gradient_checkpointing", False)
    return "" if able else "it has no blocks to checkpoint"


def checkpoint(model: nn.Module, reentrant: bool) -> None:
    if isinstance(model, Checkpointable):
        model.reentrant = reentrant
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def bfloat16() -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16)


CONDITIONS = {
    condition.name: condition
    for condition in [
        Condition("plain"),
        Condition("checkpointed", why_not_checkpointed, recompute=False),
        Condition("checkpointed, reentrant", why_not_checkpointed, recompute=True),
        Condition("tied", why_not_tied, tie),
        Condition("sliced inputs", batch=with_inputs(sliced)),
        Condition("expanded inputs", batch=with_inputs(lambda x: x[:1].expand(SAMPLES, *x.shape[1:]))),
        Condition("positions (1, T)", takes("position_ids"), batch=positions),
        Condition("T = B", takes("input_ids"), batch=as_many_tokens_as_samples),
        Condition(
            "4-D inputs",
            lambda entry, model: "" if entry.batch_4d else "its architecture fixes the axes of its inputs",
            batch=lambda entry, batch: entry.batch_4d(),
        ),
        Condition("padding", takes("attention_mask"), batch=padded),
        Condition("eval mode", change=nn.Module.eval),
        Condition("frozen parts", change=freeze),
        Condition("late, stored", late="stored"),
        Condition("late, replayed", late="replay"),
        Condition("late, forward", late="forward"),
        Condition("two microbatches", microbatches=2),
        Condition("bfloat16 autocast", context=bfloat16, tolerance=2e-2, gradient_tolerance=2e-2),
    ]
}
