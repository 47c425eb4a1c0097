"""What an iteration matches: an expert, where its student starts, and the batches that the student sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ghostgram.algorithms.pad.gradient.inner import Problem
from ghostgram.algorithms.pad.gradient.mask import Mask
from ghostgram.algorithms.pad.gradient.match import match
from ghostgram.algorithms.pad.keyed import integer, permutation
from ghostgram.algorithms.pad.settings import Settings
from ghostgram.algorithms.pad.state import DistilledState
from ghostgram.algorithms.pad.students.flat import Flat
from ghostgram.training.ranks import rank_and_size

if TYPE_CHECKING:
    from ghostgram.algorithms.pad.experts.store import Store
    from ghostgram.algorithms.pad.images.augment import Dsa


@dataclass(frozen=True)
class Matching:
    """What stays the same through a distillation."""

    settings: Settings
    flat: Flat
    store: Store
    mask: Mask
    augment: Dsa | None


@dataclass(frozen=True)
class Match:
    """One match of an iteration: which student met which expert, how well, and the gradients of its loss."""

    expert: int
    start: int
    """The epoch that the student started at."""
    loss: float
    gradients: dict[str, Tensor]
    """Of images, beta and, where they are learned, label_logits."""


def drawn(settings: Settings, experts: int, iteration: int, k: int) -> tuple[int, int]:
    """The expert and the start epoch of match k of an iteration: experts come in shuffled passes, epochs uniformly."""
    turn = iteration * settings.matches + k
    cycle, place = divmod(turn, experts)
    expert = int(permutation(settings.seed, "expert order", (cycle,), experts)[place])
    bound = settings.start_before(iteration)
    return expert, integer(settings.seed, "start epoch", (turn,), settings.start_first, bound)


def batches(settings: Settings, turn: int, n: int, device: torch.device) -> Callable[[int], Tensor]:
    """The images of each step of a student: sweeps over shuffles of all of them, the last batch of a sweep smaller."""
    size = min(settings.batch or n, n)
    a_sweep = -(-n // size)

    @cache
    def order(sweep: int) -> Tensor:
        return torch.from_numpy(permutation(settings.seed, "inner batches", (turn, sweep), n)).to(device)

    def of_step(step: int) -> Tensor:
        if size == n:
            return torch.arange(n, device=device)
        sweep, part = divmod(step, a_sweep)
        return order(sweep)[part * size : (part + 1) * size]

    return of_step


def matches(matching: Matching, state: DistilledState) -> list[Match]:
    """The matches of the next iteration, shared out over processes; each gets all of them, with the same bits."""
    rank, size = rank_and_size()
    shapes = {name: value.shape for name, value in state.momenta.items()}
    found = []
    for k in range(matching.settings.matches):
        expert, start = drawn(matching.settings, matching.store.experts, state.iteration, k)
        if k % size == rank:
            packed = _packed(matching, state, k, expert, start)
        else:
            packed = state.images.new_empty(1 + sum(shape.numel() for shape in shapes.values()))
        found.append((expert, start, packed))
    for k, (_, _, packed) in enumerate(found):
        if size > 1:
            dist.broadcast(packed, src=k % size)
    unpacked = []
    for expert, start, packed in found:
        loss, *parts = torch.split(packed, [1, *(shape.numel() for shape in shapes.values())])
        gradients = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        unpacked.append(Match(expert, start, float(loss), gradients))
    return unpacked


def _packed(matching: Matching, state: DistilledState, k: int, expert: int, start: int) -> Tensor:
    """Loss and gradients of a match, in the order of the state's momenta, as one vector."""
    s, n = matching.settings, len(state.images)
    turn = state.iteration * s.matches + k
    target = start + s.target_epochs
    problem = Problem(
        flat=matching.flat,
        start=torch.tensor(matching.store[expert, start]).to(state.images),
        target=torch.tensor(matching.store[expert, target]).to(state.images),
        mask=matching.mask,
        steps=s.steps,
        batches=batches(s, turn, n, state.images.device),
        augment=_augmentation(matching.augment, turn),
        momentum=s.inner_momentum,
    )
    try:
        made = match(
            problem, state.images, state.label_logits, state.beta,
            gradient=s.gradient, learn_labels=s.labels == "learn",
            store=s.store, chunk=s.chunk, second=s.second,
        )  # fmt: skip
    except ValueError as why:
        raise ValueError(f"expert {expert}, epochs {start} and {target}: {why}") from why
    gradients = {"images": made.images, "label_logits": made.labels, "beta": made.beta}
    parts = [gradients[name] for name in state.momenta]
    return torch.cat([part.reshape(-1) for part in (state.images.new_tensor([made.loss]), *parts) if part is not None])


def _augmentation(dsa: Dsa | None, turn: int) -> Callable[[int, Tensor, Tensor], Tensor]:
    """DSA of each step of a student, keyed by the match and the step; nothing where there is none."""
    if dsa is None:
        return lambda step, images, indices: images
    return lambda step, images, indices: dsa.apply(dsa.draw((turn, step), indices.cpu()), images)
