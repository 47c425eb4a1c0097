"""What arms of the experiment on Velocitune are made of: real text, a model that knows prose, and its training."""

from __future__ import annotations

import hashlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghostgram import data
from ghostgram.algorithms.velocitune.controller import MixtureController
from ghostgram.algorithms.velocitune.estimate import estimate_targets
from ghostgram.algorithms.velocitune.evaluate import DomainLosses, evaluate_domains
from ghostgram.algorithms.velocitune.loader import DynamicMixture
from ghostgram.algorithms.velocitune.losses import NextTokenLoss
from ghostgram.algorithms.velocitune.mixed import MixtureBatch
from ghostgram.algorithms.velocitune.rules.base import Reweighter
from ghostgram.algorithms.velocitune.rules.doremi import DoReMi, excess
from ghostgram.algorithms.velocitune.targets import Point, Targets

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tiny_lm import TinyLM

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Of all arms; another experiment has other ones, and a file of results holds one experiment."""

    prose: tuple[str, ...] = ("austen", "shakespeare", "kjv")
    shares: Mapping[str, float] = field(
        default_factory=lambda: {"python_code": 0.5, "cpp_headers": 0.25, "manuals": 0.15, "licences": 0.1}
    )
    length: int = 128
    batch: int = 8
    width: int = 64
    layers: int = 2
    heads: int = 4
    rate: float = 4e-3
    base_rate: float = 2e-3
    warm_up: int = 20
    base_steps: int = 3000
    steps: int = 800  # of the static arm: one epoch of every domain
    every: int = 50  # steps between updates
    control: int = 32  # rows of a domain that rules see the losses of, others for each seed
    judge: int = 96  # rows of a domain that arms are judged by, the same for all
    seeds: int = 6
    doremi: float = 0.25  # length of its reference and of its proxy run, as a share of `steps`

    @property
    def row_tokens(self) -> int:
        return self.batch * self.length


class Clock(dict[str, float]):
    """CPU seconds of this process by part: what other processes do in between is not counted."""

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begun = time.process_time()
        try:
            yield
        finally:
            self[part] = self.get(part, 0.0) + time.process_time() - begun


class Texts:
    """Rows of bytes of each domain: to train on, to control by and to judge by, the latter two of other documents."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._seen: dict[str, list[str]] = {}
        self._held_out: Rows = {}
        for name in settings.shares:
            seen, unseen = data.split(in_latin(data.load_text(name)), 0.2, 0)
            count = settings.judge + settings.seeds * settings.control
            self._seen[name] = seen
            self._held_out[name] = _rows(data.windows(unseen, settings.length, count, 0, absent_from=seen))
        self.judge = {name: rows[: settings.judge] for name, rows in self._held_out.items()}

    def training(self, seed: int) -> Rows:
        """As many rows of each domain as make a run one epoch of each."""
        total, s = self.settings.steps * self.settings.batch, self.settings
        return {
            name: _rows(data.windows(self._seen[name], s.length, round(share * total), seed))
            for name, share in s.shares.items()
        }

    def control(self, seed: int) -> Rows:
        first = self.settings.judge + seed * self.settings.control
        return {name: rows[first : first + self.settings.control] for name, rows in self._held_out.items()}

    def prose(self) -> Rows:
        """Equal parts of every kind of prose, one epoch for the base."""
        s = self.settings
        each = s.base_steps * s.batch // len(s.prose)
        return {name: _rows(data.windows(data.load_text(name), s.length, each, 0)) for name in s.prose}

    def digest(self) -> str:
        """Of what arms are judged by: it changes with the versions of Python and torch."""
        rows = torch.cat(list(self.judge.values())).numpy().astype(np.uint8)
        return hashlib.sha256(rows.tobytes()).hexdigest()


def in_latin(documents: list[str]) -> list[str]:
    """Those of at most 1 % other bytes than ASCII: a few windows in Chinese would decide the mean of a small set."""
    return [document for document in documents if len(document.encode()) <= 1.01 * len(document)]


def _rows(windows: Any) -> Tensor:
    return torch.from_numpy(windows.astype(np.int64))


def new_model(settings: Settings) -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(settings.width, settings.layers, settings.heads, settings.length)


def base(settings: Settings, texts: Texts, path: Path) -> TinyLM:
    """The model that every arm of every seed starts from; trained on prose unless the file is there."""
    model = new_model(settings)
    if not path.exists():
        mixture = DynamicMixture(prose := texts.prose(), np.ones(len(prose)), settings.batch)
        learn(model, mixture, settings.base_steps, replace(settings, rate=settings.base_rate), Clock())
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), unfinished := path.with_suffix(".new"))
        unfinished.rename(path)
    model.load_state_dict(torch.load(path))
    return model


def parameters_of(model: TinyLM) -> int:
    """N: embeddings aside."""
    return sum(p.numel() for p in model.blocks.parameters())


def token_losses(model: nn.Module, rows: Tensor) -> Tensor:
    """(n, T - 1) nats."""
    return F.cross_entropy(model(rows)[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")


def mean_loss(model: nn.Module, batch: MixtureBatch) -> Tensor:
    return token_losses(model, batch.data).mean()


def learn(
    model: nn.Module,
    mixture: DynamicMixture,
    steps: int,
    settings: Settings,
    clock: Clock,
    after: Callable[[MixtureBatch], None] = lambda batch: None,
    loss: Callable[[nn.Module, MixtureBatch], Tensor] = mean_loss,
) -> None:
    """Trains by AdamW: a warm-up, then a constant rate, which falls to 0 over the last fifth."""
    optimizer = torch.optim.AdamW(model.parameters(), settings.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / settings.warm_up, 5 * (1 - step / steps))
    )
    batches = iter(mixture.loader())
    for _ in range(steps):
        with clock("sample"):
            batch = next(batches)
        with clock("train"):
            loss(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        after(batch)


def measured(model: TinyLM, rows: Rows) -> DomainLosses:
    return evaluate_domains(model, rows, loss=NextTokenLoss(model, model.head), batch=16)


def pair(found: DomainLosses) -> list[list[float]]:
    """Losses and their standard errors, for a row."""
    return [found.loss.tolist(), found.se.tolist()]


@dataclass
class Trained:
    """A model that an arm has made, and what that took."""

    model: TinyLM
    mixture: DynamicMixture
    controller: MixtureController
    clock: Clock


def reweighted(
    model: TinyLM, training: Rows, control: Rows, rule: Reweighter, steps: int, settings: Settings, seed: int
) -> Trained:
    """A run whose weights a rule moves after every `every` steps; a static one is not evaluated on the way."""
    tokens, clock, moves = steps * settings.row_tokens, Clock(), bool(rule.reads)
    interval = settings.every * settings.row_tokens if moves else tokens
    sizes = {name: len(rows) for name, rows in training.items()}
    controller = MixtureController(
        sizes, rule, interval_tokens=interval, budget=tokens, parameters=parameters_of(model)
    )
    mixture = DynamicMixture(training, controller, settings.batch, seed=seed)

    def evaluate() -> DomainLosses:
        with clock("evaluate"):
            return measured(model, control)

    def after(batch: MixtureBatch) -> None:
        with clock("control"):
            controller.observe(batch.domain_ids, batch.tokens)
            due = controller.due(batch.number)
        if due and moves:
            losses = evaluate()
            with clock("control"):
                controller.update(losses, after_batch=batch.number)

    if moves:
        controller.begin(evaluate())
    learn(model, mixture, steps, settings, clock, after)
    return Trained(model, mixture, controller, clock)


def doremi_weights(
    model: TinyLM, reference: TinyLM, training: Rows, steps: int, settings: Settings, seed: int
) -> tuple[MixtureController, Clock, list[list[float]]]:
    """DoReMi's proxy run: its controller, its time, and its weights after every step."""
    clock, course, names = Clock(), [], list(training)
    sizes = {name: len(rows) for name, rows in training.items()}
    controller = MixtureController(sizes, DoReMi("paper"), mode="loss", parameters=parameters_of(model))
    mixture = DynamicMixture(training, controller, settings.batch, seed=seed)

    def loss(model: nn.Module, batch: MixtureBatch) -> Tensor:
        found = token_losses(model, batch.data)
        with torch.no_grad():
            known = token_losses(reference, batch.data)
        domains = batch.domain_ids[:, None].expand_as(found)
        more, tokens = excess(
            found.detach().flatten().numpy(), known.flatten().numpy(), domains.flatten().numpy(), len(names)
        )
        controller.observe(batch.domain_ids, batch.tokens)
        controller.update(after_batch=batch.number, excess_sum=more, excess_tokens=tokens)
        course.append(controller.rule.weights.tolist())
        weight = torch.tensor(controller.loss_weights, dtype=found.dtype)[domains]
        return (weight * found).sum() / weight.sum()

    learn(model, mixture, steps, settings, clock, loss=loss)
    return controller, clock, course


def fitted(settings: Settings, proxies: dict[str, Any], of: str, start: list[list[float]], tokens: int) -> Targets:
    """Targets at so many tokens by the law of continued training, whatever the width of their intervals."""
    names = list(settings.shares)
    points = {
        name: [
            Point(int(steps) * settings.row_tokens, found[of][0][k], found[of][1][k])
            for steps, found in proxies["points"].items()
        ]
        for k, name in enumerate(names)
    }
    initial = {name: (start[0][k], start[1][k]) for k, name in enumerate(names)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # flags say it too, and rows keep them
        return estimate_targets(points, initial, tokens, "anchored", allow=("interval", "bound"))
