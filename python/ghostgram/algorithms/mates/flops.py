"""What each part of the method costs in floating-point operations, a multiplication and an addition counted as two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = ("train", "label", "audit", "fit", "score", "select")
"""What operations are booked under."""

UPDATE = 12
"""Operations of one AdamW update for each parameter: two moments, two corrections, a root, a quotient, decay."""

SELECT = 100
"""Operations for each document of a pool: its standardised score, Philox, its key and its place among the best."""


@dataclass(frozen=True)
class Transformer:
    """The sizes that the cost of a transformer depends on.

    Args:
        weights: Of matrices that every token is multiplied with: all but tables that are only looked up in. A tied
            vocabulary matrix counts, once.
        layers: With attention.
        width: Of a layer's queries, all heads together.
        parameters: Trainable ones in all, tables included.
        causal: Whether a token attends to itself and to those before it, or to all.
    """

    weights: int
    layers: int
    width: int
    parameters: int
    causal: bool = True

    def forward(self, tokens: float, length: float) -> float:
        """Of `tokens` in sequences of `length`: 2 for each token and weight, 4 width for each pair that attends."""
        attended = (length + 1) / 2 if self.causal else length
        return tokens * (2 * self.weights + 4 * self.layers * self.width * attended)

    def train(self, tokens: float, length: float) -> float:
        """Forward and backward, which is two forwards: `6 P tokens` and attention."""
        return 3 * self.forward(tokens, length)

    def exact(self, tokens: float, length: float, reference_tokens: float, reference_length: float) -> float:
        """One exact label: the step on a document of `tokens`, its update, and the loss of the reference."""
        probe = self.train(tokens, length) + UPDATE * self.parameters
        return probe + self.forward(reference_tokens, reference_length)

    def first_order(self, backend: str, tokens: float, length: float) -> float:
        """Labels of `tokens` tokens by a first-order backend, reference gradients apart.

        "dots" is a forward and a backward, whose weight gradient is replaced by statistics at its price; "adam"
        contracts a second time; "jvp" has two tangent products for every product; "finite_difference" is two forwards.

        Raises:
            ValueError: Another backend.
        """
        costs = {
            "dots": self.train(tokens, length),
            "adam": self.train(tokens, length) + 2 * self.weights * tokens,
            "jvp": 3 * self.forward(tokens, length),
            "finite_difference": 2 * self.forward(tokens, length),
        }
        if backend not in costs:
            raise ValueError(f"backend: expected one of {sorted(costs)}, got {backend!r}")
        return costs[backend]


@dataclass
class FlopsLedger:
    """Operations by kind (`KINDS`), added up over stages."""

    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    def add(self, kind: str, flops: float) -> None:
        """Books operations.

        Raises:
            ValueError: The kind is unknown, or the number negative.
        """
        if kind not in self.spent:
            raise ValueError(f"kind: expected one of {list(self.spent)}, got {kind!r}")
        if not flops >= 0:
            raise ValueError(f"flops: expected at least 0, got {flops}")
        self.spent[kind] += flops

    def merge(self, spent: Mapping[str, float]) -> None:
        """Books what another ledger, or a manifest, holds."""
        for kind, flops in spent.items():
            self.add(kind, flops)

    @property
    def beside_training(self) -> float:
        """Operations of everything but training."""
        return sum(flops for kind, flops in self.spent.items() if kind != "train")

    @property
    def overhead(self) -> float:
        """What the selection costs, over what training does; nan before any training."""
        return self.beside_training / self.spent["train"] if self.spent["train"] else float("nan")
