"""What the experiments on In-Run Data Shapley share: real text, a small model, its training, and results on disk."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from ghostgram import data

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[2]))
import recording
from tiny_lm import TinyLM

FOUND = recording.RESULTS / "in_run_shapley"
DOMAINS = ("python_code", "tech_docs", "cpp_headers", "shakespeare", "kjv")
WINDOW, BATCH, WIDTH, LAYERS, HEADS = 128, 16, 64, 2, 4
WARM_UP, MAX_NORM = 20, 1.0
HELD_OUT = 0.2  # of every domain's documents
TRAINING, FRESH = 960, 512  # windows cut per domain: of documents trained on, and of those held out
SHUFFLED, NOISED = 0.1, 0.05  # shares of the training windows that are spoiled


@dataclass
class Corpus:
    """What one seed trains on, is valued by and is judged by. Windows are int64 (count, WINDOW)."""

    text: Tensor
    corruption: np.ndarray  # of every training window: "", "shuffle" or "noise"
    validation: Tensor
    test: Tensor


def corpus(seed: int, documents: int, validation: int) -> Corpus:
    """Draws training windows, spoils some, and divides the held-out windows between validation and test."""
    training, held_out = _windows()
    generator = np.random.default_rng(seed)
    chosen = training[generator.permutation(len(training))[:documents]]
    shuffled, is_shuffled = data.corrupt(chosen, SHUFFLED, seed, "shuffle")
    spoiled, is_noise = data.corrupt(shuffled, NOISED, seed + 1, "noise")
    mixed = torch.from_numpy(held_out[generator.permutation(len(held_out))]).long()
    corruption = np.select([is_noise, is_shuffled], ["noise", "shuffle"], "")
    return Corpus(torch.from_numpy(spoiled).long(), corruption, mixed[:validation], mixed[validation:])


def _windows() -> tuple[np.ndarray, np.ndarray]:
    """Windows of documents trained on and of others, all `DOMAINS` in equal parts; cut once and kept in the cache."""
    cached = data.cache_folder() / f"experiments-{WINDOW}-{TRAINING}-{FRESH}.npz"
    if not cached.exists():
        training, held_out = [], []
        for name in DOMAINS:
            seen, unseen = data.split(data.load_text(name), HELD_OUT, 0)
            training.append(data.windows(seen, WINDOW, TRAINING, 0))
            held_out.append(data.windows(unseen, WINDOW, FRESH, 0, absent_from=seen))
        save_arrays(cached, training=np.concatenate(training), held_out=np.concatenate(held_out))
    arrays = np.load(cached)
    return arrays["training"], arrays["held_out"]


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes an .npz whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
        np.savez(file, **arrays)
    os.replace(file.name, path)


class Learner:
    """A model with AdamW, warm-up and clipping at norm 1, as in the demo.

    Args:
        seed: Of the weights.
        lr: Reached after the warm-up.
        model: Another one than the small language model.
        cooled: Steps of a run over whose second half the learning rate falls to a tenth; None keeps it.
    """

    def __init__(self, seed: int, lr: float, model: nn.Module | None = None, cooled: int | None = None) -> None:
        torch.manual_seed(seed)
        self.model = model or TinyLM(WIDTH, LAYERS, HEADS, WINDOW)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)

        def factor(step: int) -> float:
            left = 1.0 if cooled is None else 2 * (cooled - step) / cooled
            return min(1.0, (step + 1) / WARM_UP, max(left, 0.1))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self, text: Tensor, scored: AbstractContextManager[None] | None = None) -> Tensor:
        """Trains on one batch, scored if wanted; returns the loss of every window (B,)."""
        with scored or nullcontext():
            losses = window_losses(self.model, text)
            losses.mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return losses.detach()


def window_losses(model: nn.Module, text: Tensor) -> Tensor:
    """Mean cross-entropy, nats per byte, of every window of `text` (B, T): (B,)."""
    logits = model(text[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none").view(len(text), -1).mean(1)


def mean_loss(windows: Tensor) -> Callable[[nn.Module], Tensor]:
    """A validation set."""
    return lambda model: window_losses(model, windows).mean()


def batches(count: int, steps: int, seed: int, kept: np.ndarray | None = None, size: int = BATCH) -> Iterator[Tensor]:
    """Ids of every batch. Those of a subset come in the order in which they come without it."""
    generator, waiting = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    wanted = torch.ones(count, dtype=torch.bool) if kept is None else torch.from_numpy(kept)
    for _ in range(steps):
        while len(waiting) < size:
            order = torch.randperm(count, generator=generator)
            waiting = torch.cat([waiting, order[wanted[order]]])
        yield waiting[:size]
        waiting = waiting[size:]


def record(experiment: str, key: dict[str, Any], **found: Any) -> None:
    """Keeps a row in results/in_run_shapley/<device>.json, in place of an earlier one with the same key."""
    recording.save(
        experiment,
        [key | found],
        keep=lambda old: any(old[name] != value for name, value in key.items()),
        folder=FOUND,
    )


def rows(experiment: str) -> list[dict[str, Any]]:
    """What `record` has kept on this device."""
    path = FOUND / f"{recording.device_stem()}.json"
    return json.loads(path.read_text()).get(experiment, {}).get("rows", []) if path.exists() else []


def interval(numbers: Iterable[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % confidence interval by Student's t."""
    array = np.asarray(list(numbers), float)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    return float(array.mean()), float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5)


def main(doc: str, run: Callable[..., None], table: Callable[[], None], **arguments: dict[str, Any]) -> None:
    """An experiment's command line: one run, whose arguments are described as argparse does, or the table of all."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    for name, described in arguments.items():
        parser.add_argument(f"--{name}", **described)
    options = vars(parser.parse_args())
    table() if options.pop("table") else run(**options)
