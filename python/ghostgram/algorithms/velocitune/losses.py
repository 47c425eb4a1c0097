"""Next-token losses of sequences, the logits of a batch never stored whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ghostgram.ops.softmax_stats import softmax_stats

IGNORED = -100
"""Label of positions that are no target."""


class Sums(NamedTuple):
    """Of every sequence of a batch."""

    losses: Tensor
    """(n,) float64, summed token losses in nats."""
    tokens: Tensor
    """(n,) int64, targets counted."""


class NextTokenLoss:
    """Summed next-token losses of sequences, the head of the model run on some rows at a time.

    For a sequence x_1 ... x_T the targets are x_2 ... x_T, each predicted from what comes before it:
    `S = sum_t -log p(x_t+1 | x_1 ... x_t)`. Sequences of a batch that differ in length are run apart: nothing is
    padded, so nothing is assumed of the model's masks.

    The head is the linear layer from hidden states to logits. While the model runs, calls of the head are answered by
    running it on `rows` hidden states at a time and keeping nothing but their losses; everything around it, hooks of
    wrappers included, is as in training. That is only right if the model returns the head's output as it is. The first
    batch is therefore run whole once and compared; a model that scales or caps its logits is run whole always, which a
    warning says.

    Args:
        model: From (n, T) int64 token numbers to logits (n, T, C), or to an object with `logits`, or to a tuple whose
            first entry they are.
        head: The layer; None for `model.get_output_embeddings()`, or else the layer named `lm_head`.
        rows: Hidden states that the head is run on at a time.

    Cost:
        That of the model's forward, plus one whole forward of one sequence; memory for `rows` times C logits.
    """

    def __init__(self, model: nn.Module, head: nn.Module | None = None, rows: int = 1024) -> None:
        if rows < 1:
            raise ValueError(f"rows: expected at least 1, got {rows}")
        self.model, self.rows = model, rows
        self.head = _head(model) if head is None else head
        self._checked = False

    def __call__(self, sequences: Sequence[Any]) -> Sums:
        """Sums of sequences: (T,) tensors of token numbers, or mappings with `input_ids` and, if wanted, `labels`.

        Labels are those of the tokens at their own places, -100 where they do not count.

        Raises:
            ValueError: One is not of one axis, or labels differ from it in length.
        """
        pairs = [_tokens_and_labels(sequence) for sequence in sequences]
        device = next(self.model.parameters()).device
        losses = torch.zeros(len(pairs), dtype=torch.float64)
        counts = torch.tensor([int((labels[1:] != IGNORED).sum()) for _, labels in pairs])
        for places in _of_equal_length([len(tokens) for tokens, _ in pairs]):
            ids = torch.stack([pairs[place][0] for place in places]).to(device)
            labels = torch.stack([pairs[place][1] for place in places]).to(device)
            losses[places] = self._summed(ids, labels)
        return Sums(losses, counts)

    def _summed(self, ids: Tensor, labels: Tensor) -> Tensor:
        targets = torch.full_like(labels, IGNORED)
        targets[:, :-1] = labels[:, 1:]
        if not self._checked:
            self._check(ids[:1])
        if self.head is None:
            kept = [self._of_rows(_logits(self.model(ids)).flatten(0, -2), targets.flatten())]
        else:
            with _answered(self.head, lambda run, hidden: self._of_hidden(run, hidden, targets)) as kept:
                self.model(ids)
            if len(kept) != 1:
                raise ValueError(f"head: expected one call of it in a forward, got {len(kept)}")
        return kept[0].reshape(targets.shape).cpu().double().sum(1)

    def _of_hidden(self, run: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2)
        if len(rows) != targets.numel():
            raise ValueError(f"head: expected {targets.numel()} hidden states, got shape {tuple(hidden.shape)}")
        parts = zip(torch.split(rows, self.rows), torch.split(targets.flatten(), self.rows), strict=True)
        return torch.cat([self._of_rows(run(some), labels) for some, labels in parts])

    def _of_rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = softmax_stats(logits, targets, IGNORED).loss
        return loss

    def _check(self, ids: Tensor) -> None:
        """Runs one sequence whole, and gives the head up if the model returns anything but its output."""
        self._checked = True
        if self.head is None:
            why = "none was found"
        else:
            outputs: list[Tensor] = []
            hook = self.head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            try:
                logits = _logits(self.model(ids))
            finally:
                hook.remove()
            if len(outputs) == 1 and torch.equal(logits.flatten(), outputs[0].flatten().to(logits.dtype)):
                return
            why = "the model does not return its output as it is"
            self.head = None
        warnings.warn(f"head: {why}, so the logits of every batch are stored whole", stacklevel=2)


@contextmanager
def _answered(
    head: nn.Module, answer: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """Calls of a layer's forward give logits of no classes inside; what was found in their place is kept."""
    forward, own = head.forward, "forward" in head.__dict__
    kept: list[Tensor] = []

    def nothing_stored(hidden: Tensor) -> Tensor:
        kept.append(answer(forward, hidden))
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    head.forward = nothing_stored  # an attribute of the module: hooks around its forward are called as always
    try:
        yield kept
    finally:
        if own:
            head.forward = forward
        else:
            del head.forward


def _head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, by the two names that are customary."""
    named = getattr(model, "get_output_embeddings", None)
    head = named() if callable(named) else getattr(model, "lm_head", None)
    return head if isinstance(head, nn.Module) else None


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if not isinstance(found, Tensor):
        raise TypeError(f"model: expected logits, or an output with them, got {type(output).__name__}")
    return found


def _tokens_and_labels(sequence: Any) -> tuple[Tensor, Tensor]:
    mapped = sequence if isinstance(sequence, dict) else {"input_ids": sequence}
    tokens = torch.as_tensor(mapped["input_ids"]).long()
    labels = torch.as_tensor(mapped.get("labels", tokens)).long()
    if tokens.ndim != 1 or labels.shape != tokens.shape:
        got = f"{tuple(tokens.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"sequence: expected (T,) token numbers and as many labels, got {got}")
    return tokens, labels


def _of_equal_length(lengths: Sequence[int]) -> list[list[int]]:
    """Places of sequences by length, those of one length in order."""
    groups: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        groups.setdefault(length, []).append(place)
    return list(groups.values())


def of_one_length(sequences: Sequence[Any]) -> bool:
    """Whether all sequences are equally long."""
    return len({len(_tokens_and_labels(sequence)[0]) for sequence in sequences}) == 1
