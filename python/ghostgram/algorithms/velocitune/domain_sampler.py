"""A stream of batches between two of which the weights of its domains are moved when it is time."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike
from torch import nn

from ghostgram._files import write_atomically
from ghostgram.algorithms.velocitune.controller import MixtureController, Update
from ghostgram.algorithms.velocitune.evaluate import DomainLosses
from ghostgram.algorithms.velocitune.export import Mixture
from ghostgram.algorithms.velocitune.loader import DynamicMixture
from ghostgram.algorithms.velocitune.mixed import MixtureBatch
from ghostgram.algorithms.velocitune.simplex import F64

GIVEN = frozenset({"eval_loss", "eval_se", "seen", "avail", "train_loss_sum", "train_tokens"})
"""What a `DomainSampler` observes; rules that read more need a loop around `MixtureController`."""


class DomainSampler:
    """A loop's data: iterating gives `MixtureBatch`es, and between two of them weights are updated when it is time.

    A batch counts as trained on once the loop asks for the next one, or for the state, or is entered again.

    A loop that does not fetch batches just before it trains on them calls `received` and `trained` itself, as the
    callbacks of trainers do.

    Args:
        controller: Of the weights, attached to the mixture.
        mixture: What is read.
        model: What is evaluated.
        evaluate: From the model to the losses of the domains; collective.
        tokens: After so many the iteration ends.
        reading: Options of `DynamicMixture.loader`.

    Raises:
        ValueError: The rule reads what is not observed here.
    """

    def __init__(
        self,
        controller: MixtureController,
        mixture: DynamicMixture,
        model: nn.Module,
        evaluate: Callable[[nn.Module], DomainLosses],
        tokens: float,
        reading: Mapping[str, Any],
    ) -> None:
        rule = controller.rule
        if missing := sorted(rule.needs - GIVEN):
            raise ValueError(
                f"rule: expected one that reads some of {sorted(GIVEN)}, got {rule.name}, which reads {missing}"
            )
        self.controller, self.mixture, self.model = controller, mixture, model
        self._evaluate, self._tokens, self._reading = evaluate, tokens, dict(reading)
        self._evaluates = rule.cadence == "tokens" or "eval_loss" in rule.needs
        self._waiting: deque[tuple[MixtureBatch, Any]] = deque()  # given, and not yet trained on, with their losses
        self._given: int | None = None  # a whole batch that the iteration below has given and not gone on from

    def __iter__(self) -> Iterator[MixtureBatch]:
        self.begin()
        self._settle()
        self._waiting.clear()  # micro-batches of an iteration that was left inside a batch, which is given again whole
        for batch in self.loader():
            self.received(batch)
            if batch.micro == self.mixture.accumulation - 1:
                self._given = batch.number
            yield batch
            self._settle()
            if self.spent:
                self.controller.export()
                return

    @property
    def weights(self) -> F64:
        """(K,) shares of tokens, the last ones decided."""
        return self.controller.weights.copy()

    @property
    def spent(self) -> bool:
        """Whether the tokens have been trained on."""
        return self.controller.tokens >= self._tokens

    def export(self) -> Mixture:
        """The final and mean weights, and the history."""
        return self.controller.export()

    def report(self, nll: ArrayLike) -> None:
        """Gives the training losses of the batch that was given last, for rules that read them.

        Args:
            nll: (n,) summed token losses of its samples, nats.

        Raises:
            RuntimeError: No batch was given since the last report.
        """
        if not self._waiting:
            raise RuntimeError("report: expected a batch before its losses, got none")
        batch, _ = self._waiting.pop()
        self._waiting.append((batch, nll))

    def state_dict(self) -> dict[str, Any]:
        """What to go on from; JSON can hold it. Inside an iteration it counts the batch in hand as trained on.

        Collective: every rank calls it, and any one's state is that of all.
        """
        self._settle()
        done = self.controller.asked.batches - 1
        return {"controller": self.controller.state_dict(), "mixture": self.mixture.state_dict(done)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, for any number of ranks and workers; before iterating.

        Raises:
            ValueError: It is of other domains, contents, rule or settings.
        """
        self.mixture.load_state_dict(state["mixture"])
        self.controller.load_state_dict(state["controller"])
        self._waiting.clear()
        self._given = None

    def save(self, path: str | Path) -> None:
        """Writes the state as a JSON file, whole or not at all."""
        write_atomically(Path(path), json.dumps(self.state_dict()) + "\n")

    def load(self, path: str | Path) -> None:
        """Goes on from a file that `save` wrote."""
        self.load_state_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    # For loops that fetch ahead --------------------------------------------------------------------------------------

    def loader(self) -> Any:
        """A loader of the mixture, going on after the last batch that one gave."""
        return self.mixture.loader(**self._reading)

    def begin(self) -> None:
        """Evaluates the model before the first step, unless that was done; collective."""
        if self._evaluates and self.controller.l_init is None and not self.controller.asked.batches:
            begun = time.perf_counter()
            self.controller.begin(self._evaluate(self.model), time.perf_counter() - begun)

    def received(self, batch: MixtureBatch) -> None:
        """Notes a (micro-)batch that was fetched."""
        self._waiting.append((batch, None))

    def trained(self, number: int) -> Update | None:
        """Notes that a global batch has been trained on; when it is time, evaluates and updates. Collective.

        Args:
            number: Of the batch.

        Returns:
            The update, if there was one.
        """
        while self._waiting and self._waiting[0][0].number <= number:
            batch, nll = self._waiting.popleft()
            self.controller.observe(batch.domain_ids, batch.tokens, nll)
        if not self.controller.due(number):
            return None
        begun = time.perf_counter()
        losses = self._evaluate(self.model) if self._evaluates else None
        return self.controller.update(losses, after_batch=number, seconds=time.perf_counter() - begun)

    def _settle(self) -> None:
        given, self._given = self._given, None
        if given is not None:
            self.trained(given)
