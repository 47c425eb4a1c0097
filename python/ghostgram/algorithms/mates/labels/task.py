"""What a document is to the model: its tokens, which of them are targets, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """A causal language model's view of texts: position t sees the tokens up to t and predicts the next one.

    Args:
        encode: texts -> (ids (B, T) int64, mask (B, T) bool). The mask says which positions hold a *target*, a token
            whose prediction counts: all of them, those of a completion, or a last word alone. Padding is on the right
            and no target; the first position never is one, for nothing predicts it.
        logits: (model, ids (B, T)) -> (B, T, V); by default `model(ids)`, or what that has under `.logits`. Rows must
            not know of each other.
    """

    encode: Encode
    logits: Callable[[nn.Module, Tensor], Tensor] | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, length: int = 1024) -> Task:
        """All tokens of a text are targets, up to `length` of them, as one of transformers' tokenizers cuts them.

        Args:
            tokenizer: Called as `tokenizer(texts, truncation=True, max_length=length)`.
            length: Where texts are cut, in tokens, at least 2.

        Raises:
            ValueError: The length leaves nothing to predict.
        """
        if length < 2:
            raise ValueError(f"length: expected at least 2 tokens, got {length}")

        def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
            rows = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
            return padded([torch.as_tensor(row, dtype=torch.int64) for row in rows])

        return cls(encode)

    def sums(self, model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Every row's cross-entropy summed over its targets, and how many targets it has.

        Differentiable, by reverse and by forward mode. Logits are taken to float32, or stay float64. Columns after the
        last target of any row are not computed: a causal model's losses do not depend on them.

        Args:
            model: The model, in the mode it is in.
            ids: (B, T) int64, on any device.
            mask: (B, T) bool, as `encode` gives it.

        Returns:
            (B,) float sums in nats on the model's device, (B,) int64 counts there.

        Raises:
            ValueError: ids is not (B, T), or mask is not bool of that shape.
        """
        if ids.dim() != 2 or ids.shape != mask.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"ids, mask: expected (B, T) and a bool mask of that shape, got {tuple(ids.shape)} and {mask.dtype} of "
                f"{tuple(mask.shape)}"
            )
        if ids.shape[1] < 2:  # nothing to predict, and yet a loss of zero with a graph
            ids, mask = F.pad(ids, (0, 2 - ids.shape[1])), F.pad(mask, (0, 2 - mask.shape[1]))
        targets = mask[:, 1:]
        used = max(1, int(targets.any(0).nonzero().max()) + 1) if bool(targets.any()) else 1
        device = next(model.parameters()).device
        ids, targets = ids[:, : used + 1].to(device), targets[:, :used].to(device)
        logits = self._logits(model, ids[:, :-1])
        if logits.shape[:2] != targets.shape:
            raise ValueError(f"logits: expected shape ({ids.shape[0]}, {used}, V), got {tuple(logits.shape)}")
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(wide.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(targets.shape)
        return losses.masked_fill(~targets, 0).sum(1), targets.sum(1)

    def losses(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        """(B,) the mean cross-entropy over each row's targets in nats, 0 for a row without any.

        Args:
            model: The model, in the mode it is in.
            ids: (B, T) int64, on any device.
            mask: (B, T) bool, as `encode` gives it.
        """
        sums, counts = self.sums(model, ids, mask)
        return sums / counts.clamp(min=1)

    def _logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        if self.logits is not None:
            return self.logits(model, ids)
        output = model(ids)
        return output if isinstance(output, Tensor) else output.logits


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of tokens of any length as (ids, mask), all but the first token of each being targets."""
    width = max([2, *(len(row) for row in rows)])
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, 1 : len(row)] = True
    return ids, mask
