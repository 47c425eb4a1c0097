"""Training of an encoder on z-scores, that goes on exactly where it was killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghostgram._files import whole_file
from ghostgram.algorithms.mates.influence.pooling import Chunks, Document, Pooled, in_batches, padded
from ghostgram.algorithms.mates.influence.targets import rank_agreement

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Recipe:
    """How an encoder is trained and run."""

    epochs: int = 5
    batch: int = 256
    lr: float = 5e-5
    """At the first step; it decays linearly to 0."""
    weight_decay: float = 0.01
    """Of matrices."""
    evaluations: int = 10
    """An epoch."""
    tokens_at_once: int = 16384
    """Of one forward, padding counted. Gradients of a batch are summed over as many as it takes."""
    dtype: str = "float32"
    """"bfloat16": products of matrices under autocast."""
    checkpoint_seconds: float = 60.0
    """A checkpoint is written at the first evaluation after so long."""

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The precision to run the encoder in."""
        return nullcontext() if self.dtype == "float32" else torch.autocast(device.type, torch.bfloat16)


def run(
    net: Pooled, width: int, documents: Sequence[Document], recipe: Recipe, what: Callable[[Chunks], Tensor]
) -> F32:
    """(n, width) of `what` the net says, in the order of the documents; batches of like lengths, no dropout."""
    device = net.head.weight.device
    net.eval()
    found = np.empty((len(documents), width), np.float32)
    with torch.inference_mode(), recipe.autocast(device):
        for rows in in_batches(documents, recipe.tokens_at_once):
            found[rows] = what(padded([documents[row] for row in rows], device)).float().cpu().numpy()
    return found


@dataclass
class Training:
    """One fit: its data, and all of its state that changes."""

    net: Pooled
    recipe: Recipe
    seed: int
    train: list[Document]
    targets: F64
    held_out: list[Document]
    held_out_targets: F64
    key: str
    """Of everything above: a checkpoint of another fit is not gone on with."""
    path: Path | None
    step: int = 0
    best: dict[str, Any] = field(default_factory=lambda: {"spearman": -2.0})
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        matrices = [p for p in self.net.parameters() if p.ndim > 1]
        others = [p for p in self.net.parameters() if p.ndim <= 1]
        decay = self.recipe.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.recipe.lr)
        self.an_epoch = -(-len(self.train) // self.recipe.batch)
        self.steps = self.recipe.epochs * self.an_epoch
        self.device = self.net.head.weight.device

    def run(self, started_warm: bool, progress: Callable[[int, int], None]) -> None:
        """Trains to the end and leaves the net as it was when it ranked the held-out documents best."""
        if self.path and self.path.exists():
            self._resume(self.path)
        if started_warm and not self.history:
            self._evaluate()
        written = time.monotonic()
        progress(self.step, self.steps)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            while self.step < self.steps:
                self._train()
                if self._is_due():
                    self._evaluate()
                    if time.monotonic() - written >= self.recipe.checkpoint_seconds or self.step == self.steps:
                        self._keep()
                        written = time.monotonic()
                progress(self.step, self.steps)
        self.net.load_state_dict(self.best["net"])

    def _is_due(self) -> bool:
        within = (self.step - 1) % self.an_epoch
        times = self.recipe.evaluations
        return (within + 1) * times // self.an_epoch > within * times // self.an_epoch

    def _train(self) -> None:
        epoch, place = divmod(self.step, self.an_epoch)
        # Order and dropout are functions of (seed, step), so that no generator's state need be kept.
        words = np.random.Philox(key=[self.seed % 2**64, 0], counter=[0, 0, 0, epoch]).random_raw(len(self.train))
        rows = np.argsort(words, kind="stable")[place * self.recipe.batch : (place + 1) * self.recipe.batch]
        dropout = np.random.Philox(key=[self.seed % 2**64, 1], counter=[0, 0, 0, self.step]).random_raw(1)
        torch.manual_seed(int(dropout[0]))
        self.net.train()
        self.optimizer.zero_grad()
        labels = int(np.isfinite(self.targets[rows]).sum())
        documents = [self.train[row] for row in rows]
        for some in in_batches(documents, self.recipe.tokens_at_once):
            wanted = torch.from_numpy(self.targets[rows[some]]).float().to(self.device)
            with self.recipe.autocast(self.device):
                errors = self.net(padded([documents[i] for i in some], self.device)) - wanted
            # A missing label's error is nan: replaced before the square, whose gradient would be nan too.
            (errors.masked_fill(wanted.isnan(), 0.0).square().sum() / max(labels, 1)).backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * (1 - self.step / self.steps)
        self.optimizer.step()
        self.step += 1

    def _evaluate(self) -> None:
        predicted = run(self.net, self.net.head.out_features, self.held_out, self.recipe, self.net)
        if not np.isfinite(predicted).all():
            raise FloatingPointError(
                f"lr: expected finite predictions, got others at step {self.step} of lr {self.recipe.lr}"
            )
        rho = float(np.mean(rank_agreement(predicted, self.held_out_targets)))
        mse = float(np.nanmean((predicted - self.held_out_targets) ** 2))
        self.history.append({"step": self.step, "spearman": rho, "mse": mse})
        if np.nan_to_num(rho, nan=-1.0) > self.best["spearman"]:
            net = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
            self.best = {"spearman": np.nan_to_num(rho, nan=-1.0).item(), "step": self.step, "net": net}

    def _keep(self) -> None:
        if self.path is None:
            return
        with whole_file(self.path) as temporary:
            state = {name: getattr(self, name) for name in ("key", "step", "best", "history")}
            torch.save(state | {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}, temporary)

    def _resume(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["key"] != self.key:
            return
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.history = state["step"], state["best"], state["history"]
