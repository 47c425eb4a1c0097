"""What methods of reweighting cost in floating-point operations, and lengths of runs that cost the same."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

KINDS = ("train", "evaluate", "proxy", "reference", "probe", "fit")
"""What operations are booked under; "probe" is training whose batches serve to measure a mixture."""

TOO_MUCH = 0.02
"""Share of the budget's training from which evaluations are warned of."""


def training(parameters: float, tokens: float) -> float:
    """6 N T: forward and backward of a model of N non-embedding parameters on T tokens."""
    return 6 * parameters * tokens


def forward(parameters: float, tokens: float) -> float:
    """2 N T: forward alone."""
    return 2 * parameters * tokens


@dataclass(frozen=True)
class Overhead:
    """What a method costs beside the main run's own training.

    Args:
        fixed: FLOPs whatever the main run's length: proxies, references, graphs.
        update: FLOPs of one update.
        every: Batches between updates; 0 if there are none.
    """

    fixed: float = 0.0
    update: float = 0.0
    every: int = 0

    def of(self, batches: int) -> float:
        """FLOPs beside a main run of so many batches."""
        return self.fixed + (batches // self.every * self.update if self.every else 0.0)


def velocitune(parameters: float, proxy_tokens: float, eval_tokens: float, every: int) -> Overhead:
    """6 N f D for the proxy, 2 N sum_k T_k for the evaluation before each update and, once, before training.

    Args:
        parameters: N, non-embedding.
        proxy_tokens: f D, of all proxy runs.
        eval_tokens: Of all evaluation sets.
        every: Batches between updates.
    """
    evaluation = forward(parameters, eval_tokens)
    return Overhead(training(parameters, proxy_tokens) + evaluation, evaluation, every)


def dbl(parameters: float, eval_tokens: float, every: int, reference: float = 0.0) -> Overhead:
    """Evaluations, and whatever reference models cost in FLOPs; DBL takes their losses as given."""
    return Overhead(reference, forward(parameters, eval_tokens), every)


def doremi(proxy_parameters: float, reference_tokens: float, proxy_tokens: float) -> Overhead:
    """6 N_p D_r for the reference and 8 N_p D_p for the proxy, which runs the reference forward as well."""
    return Overhead(training(proxy_parameters, reference_tokens) + 8 * proxy_parameters * proxy_tokens)


def skillit(parameters: float, graph_tokens: float, eval_tokens: float, every: int) -> Overhead:
    """The runs that measure the graph of skills, and evaluations."""
    return Overhead(training(parameters, graph_tokens), forward(parameters, eval_tokens), every)


def aioli(parameters: float, domains: int, rounds: int, eval_tokens: float, every: int) -> Overhead:
    """1 + rounds K evaluations an update. Probe steps train the main model: they are its own batches."""
    return Overhead(0.0, (1 + rounds * domains) * forward(parameters, eval_tokens), every)


def doge(proxy_parameters: float, domains: int, steps: int, tokens: float) -> Overhead:
    """K + 1 forwards and backwards of `tokens` tokens a step of the proxy: of each domain and of what is wanted."""
    return Overhead((domains + 1) * steps * training(proxy_parameters, tokens))


class Arm(NamedTuple):
    """How long a method may train, and what it costs."""

    batches: int
    tokens: int
    overhead: float
    """FLOPs beside the main run's training."""
    flops: float
    """In all."""


def equal_compute(
    overheads: Mapping[str, Overhead], batches: int, batch_tokens: int, parameters: float
) -> dict[str, Arm]:
    """Every arm shortened until it costs no more than training on `batches` does without any reweighting.

    Args:
        overheads: By arm; `Overhead()` for static weights, ODM and ADO, which only cost seconds.
        batches: Of the static arm.
        batch_tokens: Of a batch.
        parameters: N of the main model, non-embedding.

    Returns:
        Arms whose costs are equal but for less than one batch and one update.

    Raises:
        ValueError: A number is not positive, or an arm's fixed costs leave no batch.
    """
    if batches < 1 or batch_tokens < 1 or not parameters > 0:
        raise ValueError(
            f"batches, batch_tokens, parameters: expected numbers > 0, got {batches}, {batch_tokens} and {parameters}"
        )
    step = training(parameters, batch_tokens)
    arms = {}
    for name, overhead in overheads.items():
        low, high = 0, batches  # the longest run that fits is found by halving: costs grow with batches
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle * step + overhead.of(middle) <= batches * step else (low, middle - 1)
        if not low:
            raise ValueError(f"overheads: expected {name!r} to leave a batch of {batches * step:.3g} FLOPs, got none")
        arms[name] = Arm(low, low * batch_tokens, overhead.of(low), low * step + overhead.of(low))
    return arms


@dataclass
class Ledger:
    """FLOPs and seconds by kind (`KINDS`), booked as a run goes on.

    Args:
        parameters: N of the main model, non-embedding.
        budget_tokens: That the run is to train on; None if nothing is to be warned of.
        flops: Booked so far.
        seconds: Booked so far.
    """

    parameters: float
    budget_tokens: float | None = None
    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    def add(self, kind: str, flops: float, seconds: float = 0.0) -> None:
        """Books operations and time.

        Warns once evaluations pass 2 % of the budget's training.

        Raises:
            ValueError: The kind is unknown, or a number negative or not finite.
        """
        if kind not in self.flops:
            raise ValueError(f"kind: expected one of {list(KINDS)}, got {kind!r}")
        if not (0 <= flops < float("inf") and 0 <= seconds < float("inf")):
            raise ValueError(f"flops, seconds: expected finite numbers >= 0, got {flops} and {seconds}")
        within = self.evaluation_share <= TOO_MUCH
        self.flops[kind] += flops
        self.seconds[kind] += seconds
        if within and self.evaluation_share > TOO_MUCH:
            warnings.warn(
                f"evaluations have cost {self.evaluation_share:.1%} of the training budget: evaluate less often, or on "
                "fewer tokens",
                stacklevel=2,
            )

    def train(self, tokens: float, seconds: float = 0.0) -> None:
        """Books 6 N T."""
        self.add("train", training(self.parameters, tokens), seconds)

    def evaluate(self, tokens: float, seconds: float = 0.0) -> None:
        """Books 2 N T."""
        self.add("evaluate", forward(self.parameters, tokens), seconds)

    @contextmanager
    def timed(self, kind: str, flops: float = 0.0) -> Iterator[None]:
        """Books the time that is spent inside, and FLOPs that are known beforehand; also when it ends in an error."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(kind, flops, time.perf_counter() - start)

    @property
    def evaluation_share(self) -> float:
        """FLOPs of evaluations over those of the budget's training; 0 where there is no budget."""
        return self.flops["evaluate"] / training(self.parameters, self.budget_tokens) if self.budget_tokens else 0.0

    @property
    def total(self) -> float:
        """FLOPs of everything."""
        return sum(self.flops.values())

    def state_dict(self) -> dict[str, Any]:
        """What has been booked; JSON can hold it."""
        return {"flops": dict(self.flops), "seconds": dict(self.seconds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave, in place of what is booked here."""
        self.flops |= {kind: float(state["flops"][kind]) for kind in KINDS}
        self.seconds |= {kind: float(state["seconds"][kind]) for kind in KINDS}
