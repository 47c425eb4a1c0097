"""Reference sets: what the model shall become good at, as one number."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghostgram.algorithms.mates.labels.task import Task
from ghostgram.training.aside import evaluating, taken_gradients
from ghostgram.training.ranks import Ranks

OVERLAP = 13
"""Words in a row that a reference and an evaluation set must not share."""
RELEASE_BATCH = 32
"""Examples of a batch whose mean the release averages."""


@dataclass(frozen=True)
class Reference:
    """A named set of examples whose loss says how good a model is.

    Its loss is one token-weighted mean over the whole set,

        L_r = sum_zt mask_zt CE_zt / sum_zt mask_zt,

    which no way of cutting it into batches changes. Labels from few examples say little about the task behind them:
    take 1,024 or more; the audit says what a reference of this size is worth.

    Args:
        name: What its columns are called.
        ids: (N, T) int64 tokens, padded on the right.
        mask: (N, T) bool, the positions whose tokens are targets (see `Task`).
        weight: Its share where references are added up.

    Raises:
        ValueError: Shapes or dtypes are not those, or there is no target.
    """

    name: str
    ids: Tensor
    mask: Tensor
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.name):
            raise ValueError(f"name: expected letters, digits and underscores, for columns, got {self.name!r}")
        if self.ids.dim() != 2 or self.ids.dtype != torch.int64:
            raise ValueError(f"ids: expected (N, T) int64, got {self.ids.dtype} of shape {tuple(self.ids.shape)}")
        if self.mask.shape != self.ids.shape or self.mask.dtype != torch.bool:
            raise ValueError(
                f"mask: expected bool of shape {tuple(self.ids.shape)}, got {self.mask.dtype} of shape "
                f"{tuple(self.mask.shape)}"
            )
        if not self.tokens:
            raise ValueError(f"mask: expected a target in reference {self.name!r}, got none")

    @classmethod
    def from_texts(
        cls,
        name: str,
        texts: Sequence[str],
        task: Task,
        weight: float = 1.0,
        *,
        evaluation: Mapping[str, Sequence[str]] | None = None,
        allow_overlap: bool = False,
    ) -> Reference:
        """A reference of texts, as the task encodes them.

        Args:
            name: What its columns are called.
            texts: The examples.
            task: Encodes them.
            weight: Its share where references are added up.
            evaluation: Texts of the sets that the trained model will be judged by. Selecting for a set and reporting it
                is training on the test: an example that shares 13 words in a row with any of them is an error.
            allow_overlap: Whether such examples are taken after all.

        Raises:
            ValueError: An example shares words with an evaluation set; the message names both.
        """
        if evaluation and not allow_overlap:
            for other, theirs in evaluation.items():
                if shared := overlapping(texts, theirs):
                    raise ValueError(
                        f"texts: {len(shared)} of {len(texts)} examples of reference {name!r} share {OVERLAP} words "
                        f"in a row with evaluation set {other!r}, the first: {shared[0][:80]!r}; leave the set out of "
                        "the report and say allow_overlap=True, or take another reference"
                    )
        return cls(name, *task.encode(texts), weight)

    @property
    def counts(self) -> Tensor:
        """(N,) int64 targets of each example."""
        return self.mask[:, 1:].sum(1)

    @property
    def tokens(self) -> int:
        """Targets of all examples."""
        return int(self.mask[:, 1:].sum())

    @property
    def positions(self) -> int:
        """Positions that a pass computes: those before each example's last target."""
        columns = torch.arange(self.mask.shape[1])
        return int((self.mask * columns).amax(1).sum())

    def sums(self, model: nn.Module, task: Task, batch: int = 32) -> Tensor:
        """(N,) float64 on the CPU: every example's loss summed over its targets.

        One pass of the model as it stands, in the mode it is in; `loss` is the same with the model in evaluation mode.

        Args:
            model: A causal language model, as the task reads it.
            task: Computes the losses.
            batch: Examples that are run at once.
        """
        with torch.no_grad():
            parts = [task.sums(model, ids, mask)[0] for ids, mask in self._batches(batch)]
            return torch.cat(parts).double().cpu()

    def mean(self, sums: Tensor, reduction: str = "tokens") -> float:
        """The loss of the set in nats per token, from every example's sum.

        Args:
            sums: (N,) from `sums`.
            reduction: "tokens" for the formula above; "mates_release" for the mean of the means of batches of 32, which
                depends on the order of the examples, as the method's published code takes it.

        Raises:
            ValueError: The reduction is neither.
        """
        if reduction == "tokens":
            return float(sums.sum()) / self.tokens
        if reduction != "mates_release":
            raise ValueError(f"reduction: expected 'tokens' or 'mates_release', got {reduction!r}")
        of_batches = zip(torch.split(sums, RELEASE_BATCH), torch.split(self.counts, RELEASE_BATCH), strict=True)
        return float(torch.stack([s.sum() / n.sum() for s, n in of_batches]).mean())

    def loss(self, model: nn.Module, task: Task, batch: int = 32, reduction: str = "tokens") -> float:
        """The loss of a model in nats per token, in evaluation mode: `sums` and `mean`.

        Random states, modes and `.grad` are left as found. Under `fully_shard` all processes must call it.

        Args:
            model: The model, wrapped or not.
            task: Computes the losses.
            batch: Examples that are run at once.
            reduction: See `mean`.
        """
        ranks = Ranks(model, trainable(model))
        with evaluating(ranks.model, []), ranks.aside():
            return self.mean(self.sums(ranks.model, task, batch), reduction)

    def gradient(self, model: nn.Module, task: Task, batch: int = 32) -> dict[nn.Parameter, Tensor]:
        """The gradient of `loss` by trainable parameter, zero where it has none; of sharded ones this process's part.

        Args:
            model: The model, wrapped or not.
            task: Computes the losses.
            batch: Examples that are run at once.

        Cost:
            6 P FLOPs a token, P being the weights; one copy of the trainable ones.
        """
        parameters = trainable(model)
        ranks = Ranks(model, parameters)
        with evaluating(ranks.model, parameters), ranks.aside(), torch.enable_grad():
            for ids, mask in self._batches(batch):
                loss = task.sums(ranks.model, ids, mask)[0].sum() / self.tokens
                loss.backward()  # type: ignore[no-untyped-call]
            return taken_gradients(parameters)

    def _batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(torch.split(self.ids, size), torch.split(self.mask, size), strict=True)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training moves, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def overlapping(texts: Sequence[str], others: Sequence[str], words: int = OVERLAP) -> list[str]:
    """Those of `texts` that share so many words in a row with any of `others`, letters and digits alone compared."""

    def runs(text: str) -> Iterator[tuple[str, ...]]:
        found = re.findall(r"\w+", text.lower())
        return (tuple(found[i : i + words]) for i in range(len(found) - words + 1))

    known = {run for other in others for run in runs(other)}
    return [text for text in texts if any(run in known for run in runs(text))]
