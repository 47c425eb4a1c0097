"""The loop of a distillation: match experts, take what matches well, step images, labels and the step size."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostgram.algorithms.pad.matching import Match, Matching, matches
from ghostgram.algorithms.pad.settings import Settings
from ghostgram.algorithms.pad.state import DistilledState, RunLog, leads
from ghostgram.training.ranks import rank_and_size

BETA_FLOOR = 1e-6
_SKIPS_IN_A_ROW, _SKIP_RATE, _TOO_FEW_TO_JUDGE = 50, 0.2, 100

Validate = Callable[[DistilledState], Sequence[float]]
"""Accuracies of fresh nets, trained on the state's images, on images that nothing else has seen."""


class DistillationStopped(RuntimeError):
    """Students no longer come near experts; the message says by how much, and what may help."""


@dataclass(frozen=True)
class Course:
    """Where a distillation is kept and watched."""

    folder: Path
    made_from: dict[str, Any]
    """What a checkpoint belongs to."""
    allow_changes: Sequence[str] = ()
    validate: Validate | None = None
    told: Callable[[DistilledState], None] = lambda state: None
    """Hears of every iteration."""


def distill(matching: Matching, images: Tensor, label_logits: Tensor, course: Course) -> DistilledState:
    """Learns images, label logits and the step size by matching experts' trajectories.

        L = || m (theta_N - theta*) ||^2 / || m (theta_0 - theta*) ||^2,    theta_{i+1} = theta_i - beta grad l(theta_i)

    An iteration takes one match, or the mean of several, which processes share: the next expert of a shuffled pass, a
    start epoch t uniform on {T-, ..., U - 1}, N steps from expert[t], to be near expert[t + M]. A match whose loss is
    above `threshold`, or whose loss or gradient is not finite, is left out; an iteration without a match changes
    nothing, momenta included. What remains steps images, labels and beta by SGD with momentum, as torch.optim.SGD does.

    The folder holds a checkpoint and a log; called again after a kill at any moment, this goes on from the last
    checkpoint and ends with the same bits, on the same device, dtype, number of threads and versions.

    Args:
        matching: The experts, and how students meet them.
        images: (n, C, H, W) floating, as the experts' training images were.
        label_logits: (n, classes) floating, or (n,) int64 classes for `labels="hard"`.
        course: The folder, and who validates.

    Returns:
        The state after the last iteration, with the best one that validation has seen.

    Raises:
        ChangedError: The folder is of a run with other settings or data.
        DistillationStopped: 50 matches in a row, or more than a fifth of at least 100, were left out.
        ValueError: Two snapshots of an expert are one, up to rounding; the message names expert and epochs.

    Cost:
        An iteration: `matches` times what `match` says.

    Source:
        PAD (arXiv 2408.03360), DATM (arXiv 2310.05773), MTT (arXiv 2203.11932).
    """
    s = matching.settings
    _check_sizes(s, len(images))
    state = DistilledState.load(course.folder, course.made_from, course.allow_changes, images.device)
    state = state or DistilledState.new(images, label_logits, s.beta, s.labels == "learn")
    with RunLog(course.folder, state.iteration) if leads() else nullcontext() as log:
        while state.iteration < s.iterations:
            began = time.perf_counter()
            found, row = _iterate(matching, state)
            seconds = round(time.perf_counter() - began, 4)
            accuracies = _validated(state, s, course)
            if log:
                moved = float((state.images - images).square().mean().sqrt())
                log.append({**row, "displacement": moved, "seconds": seconds})
                if accuracies:
                    log.append({"kind": "validation", "iteration": state.iteration, "accuracies": accuracies})
                if accuracies or state.iteration == s.iterations or state.iteration % s.checkpoint_every == 0:
                    log.to_disk()
                    state.save(course.folder, course.made_from)
            course.told(state)
            _stop_if_lost(state, found, s)
    return state


def _iterate(matching: Matching, state: DistilledState) -> tuple[list[Match], dict[str, Any]]:
    """One iteration: the matches, and what the log says of it."""
    s = matching.settings
    found = matches(matching, state)
    sound = [_is_good(m, s.threshold) for m in found]
    good = [m for m, kept in zip(found, sound, strict=True) if kept]
    for kept in sound:
        state.skipped_in_a_row = 0 if kept else state.skipped_in_a_row + 1
    state.tried, state.skipped = state.tried + len(found), state.skipped + len(found) - len(good)
    gradients = {n: torch.stack([m.gradients[n] for m in good]).mean(0) for n in state.momenta} if good else {}
    _step(state, gradients, s)
    row = {
        "kind": "step", "iteration": state.iteration,
        "losses": [m.loss if math.isfinite(m.loss) else None for m in found],
        "experts": [m.expert for m in found], "starts": [m.start for m in found],
        "bound": s.start_before(state.iteration), "kept": len(good), "beta": float(state.beta),
        "entropy": _entropy(state.label_logits), "norms": {n: float(g.norm()) for n, g in gradients.items()},
    }  # fmt: skip
    state.iteration += 1
    return found, row


def _is_good(match: Match, threshold: float) -> bool:
    """Whether a match may move the set."""
    finite = all(bool(g.isfinite().all()) for g in match.gradients.values())
    return finite and math.isfinite(match.loss) and match.loss <= threshold


def _step(state: DistilledState, gradients: dict[str, Tensor], s: Settings) -> None:
    """A step of SGD with momentum on whatever has a gradient."""
    rates = {
        "images": (s.lr_images, s.momentum_images),
        "label_logits": (s.lr_labels, s.momentum_labels),
        "beta": (s.lr_beta, s.momentum_beta),
    }
    for name, gradient in gradients.items():
        rate, momentum = rates[name]
        state.momenta[name].mul_(momentum).add_(gradient)
        getattr(state, name).sub_(state.momenta[name], alpha=rate)
    if state.beta < BETA_FLOOR:
        warnings.warn(f"beta: fell below {BETA_FLOOR} and is held there: a smaller lr_beta may help", stacklevel=2)
        state.beta.fill_(BETA_FLOOR)


def _entropy(label_logits: Tensor) -> float:
    """Mean entropy of the labels, in nats."""
    if not label_logits.is_floating_point():
        return 0.0
    logs = label_logits.log_softmax(1)
    return float(-(logs.exp() * logs).sum(1).mean())


def _validated(state: DistilledState, s: Settings, course: Course) -> list[float]:
    """The accuracies of a validation, if one is due; the best iterate is remembered, the earliest of equals."""
    due = state.iteration == s.iterations or (s.eval_every and state.iteration % s.eval_every == 0)
    if course.validate is None or not due:
        return []
    accuracies = [float(each) for each in course.validate(state)]
    if not state.best or statistics.fmean(accuracies) > statistics.fmean(state.best["accuracies"]):
        state.best = {
            "iteration": state.iteration, "accuracies": accuracies, "images": state.images.clone(),
            "label_logits": state.label_logits.clone(), "beta": state.beta.clone(),
        }  # fmt: skip
    return accuracies


def _check_sizes(s: Settings, n: int) -> None:
    """Says what a run would do that its owner may not expect."""
    size = min(s.batch or n, n)
    if s.steps * size < n:
        warnings.warn(
            f"batch: {s.steps} steps of {size} images see fewer than the {n} distilled ones in an iteration",
            stacklevel=3,
        )
    if (processes := rank_and_size()[1]) > s.matches:
        raise ValueError(f"matches: expected at least one for each of {processes} processes, got {s.matches}")


def _stop_if_lost(state: DistilledState, found: Sequence[Match], s: Settings) -> None:
    """Raises where students have stopped coming near experts."""
    rate = state.skipped / state.tried
    too_often = state.tried >= _TOO_FEW_TO_JUDGE and rate > _SKIP_RATE
    if state.skipped_in_a_row >= _SKIPS_IN_A_ROW or too_often:
        losses = ", ".join(f"{m.loss:.3g}" for m in found)
        raise DistillationStopped(
            f"iteration {state.iteration}: {state.skipped_in_a_row} matches in a row and {rate:.0%} of all"
            f" {state.tried} were left out, as a loss was above {s.threshold} or not finite; the last was {losses},"
            f" with beta {float(state.beta):.3g}. A student that does not move has loss 1. If losses are far above,"
            " smaller lr_images and lr_labels, a smaller beta or fewer steps help; if they are near 1, more steps or a"
            " larger beta"
        )
