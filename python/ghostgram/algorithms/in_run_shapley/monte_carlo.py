"""Shapley values of the real optimizer step, by trying it on subsets of the batch: what closed forms are judged by."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghostgram.training.aside import random_states_kept
from ghostgram.training.linearize import check_optimizer
from ghostgram.training.oracle import per_sample

Validation = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class StepValues:
    """What one optimizer step owes to each of its samples, for K validation losses; float64 on the CPU."""

    values: Tensor
    """(B, K): -phi, positive where the sample lowered the loss."""
    errors: Tensor
    """(B, K): standard errors; zero where nothing was sampled."""
    history: Tensor
    """(K,): the change of the losses by the step without any sample: momentum, weight decay."""


class StepGame:
    """One optimizer step as a game of its samples: `U_k(S) = l_k(w after a step on sum_{i in S} g_i) - l_k(w)`.

    The step is the optimizer's own, with the state it has: torch's code runs on copies of weights and state that are
    stacked, one for each subset. A sample left out does not change the others' shares of the loss. Model, optimizer
    and random states are left as found.

    Args:
        model: The model as it is before the step; small enough to be stacked `together` times.
        optimizer: torch.optim.SGD, Adam or AdamW, as it is before the step.
        losses: Runs the model and returns (B,), every sample's share of the training loss; multiplied by the clip
            coefficient of the whole batch, if there is one.
        validation: A callable model -> scalar loss, or a dict of them; run in eval mode, attention by the math kernel.
        together: Subsets evaluated at once, through torch.func.vmap over the weights. 1 loops over them without it, for
            models that it cannot take.

    Raises:
        TypeError: The optimizer is none of the three.
        ValueError: `losses()` returns no (B,) tensor or depends on no parameter, or a parameter of the optimizer is not
            the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        losses: Callable[[], Tensor],
        validation: Validation | Mapping[str, Validation],
        together: int = 64,
    ) -> None:
        check_optimizer(optimizer)
        self.optimizer, self._together = optimizer, together
        self.sets = {"validation": validation} if callable(validation) else dict(validation)
        names = {p: name for name, p in model.named_parameters()}
        wanted = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if missing := sum(p not in names for p in wanted):
            raise ValueError(f"optimizer: {missing} of its parameters do not belong to the model")
        with random_states_kept(model):
            shares = _gradients(losses, wanted)
        self.moved = {p: names[p] for p in shares}
        """The parameters that the step moves, with their names: those that any sample reaches."""
        self.shares = torch.cat([share.flatten(1) for share in shares.values()], 1)
        """(B, n): every sample's gradient, flat."""
        self._twin = _Losses(copy.deepcopy(model).eval(), list(self.sets.values()))
        with torch.no_grad():
            self.before = self.losses_at(torch.zeros_like(self.shares[0]))

    def losses_at(self, shift: Tensor) -> Tensor:
        """(K,) validation losses at `w + shift`, differentiable in shift (n,)."""
        with random_states_kept(self._twin):
            return self._losses({p: p.detach() + part for p, part in self.split(shift).items()})

    @torch.no_grad()
    def changes(self, subsets: Tensor) -> Tensor:
        """(S, K) changes of the losses by the step on each of S subsets, given as (S, B) booleans; float64, CPU."""
        changes = []
        for part in torch.split(subsets, self._together):
            weights = self._stepped(part.to(self.shares) @ self.shares)
            with random_states_kept(self._twin):
                if self._together > 1:
                    after = vmap(self._losses, randomness="same")(weights)
                else:
                    after = self._losses({p: stacked[0] for p, stacked in weights.items()})[None]
            changes.append((after.double() - self.before.double()).cpu())
        return torch.cat(changes)

    def _stepped(self, gradients: Tensor) -> dict[nn.Parameter, Tensor]:
        """Weights after the optimizer's step on each of (S, n) gradients, stacked."""
        weights = {p: p.detach().expand(len(gradients), *p.shape).clone() for p in self.moved}
        for p, gradient in self.split(gradients).items():
            weights[p].grad = gradient.to(p.dtype)
        groups = [
            {**group, "params": [weights[p] for p in group["params"] if p in weights]}
            for group in self.optimizer.param_groups
        ]
        kind: Any = type(self.optimizer)
        twin = kind([group for group in groups if group["params"]])
        for p, stacked in weights.items():
            for name, value in self.optimizer.state.get(p, {}).items():
                alike = isinstance(value, Tensor) and name != "step"
                twin.state[stacked][name] = value.expand_as(stacked).clone() if alike else copy.deepcopy(value)
        twin.step()
        return {p: stacked.detach() for p, stacked in weights.items()}

    def _losses(self, weights: Mapping[nn.Parameter, Tensor]) -> Tensor:
        named = {f"model.{self.moved[p]}": w for p, w in weights.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives, and vmap would loop over them
            losses: Tensor = functional_call(self._twin, named, ())
        return losses

    def split(self, flat: Tensor) -> dict[nn.Parameter, Tensor]:
        """(..., n) as (..., *shape) of every parameter."""
        parts = torch.split(flat, [p.numel() for p in self.moved], -1)
        return {p: part.reshape(*flat.shape[:-1], *p.shape) for p, part in zip(self.moved, parts, strict=True)}


def monte_carlo_shapley(game: StepGame, permutations: int = 1000, seed: int = 0) -> StepValues:
    """Shapley values of a step, estimated from the marginal contributions in random orders of its samples.

    Every order is followed by its reverse: in their mean, the part of the utility in which samples interact by pairs
    is exact, so that only what is left of the curvature is sampled (antithetic sampling). Errors are those of the mean
    over such pairs.

    Args:
        game: The step.
        permutations: Orders, reverses included.
        seed: Of the draw.

    Returns:
        Values with their standard errors.

    Raises:
        ValueError: `permutations` is odd, or less than 4.

    Cost:
        B permutations steps and validation passes at the most (equal subsets are tried once), B copies of the gradient,
        and memory for `together` models.

    Source:
        arXiv 2406.11011 judges its values by such samples of an SGD step; antithetic permutations: Mitchell et al.,
        Sampling Permutations for Shapley Value Estimation (JMLR 2022).
    """
    if permutations < 4 or permutations % 2:
        raise ValueError(f"permutations: expected an even number, at least 4, got {permutations}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(len(game.shares), generator=generator) for _ in range(permutations // 2)])
    places = torch.cat([drawn, drawn.flip(1)]).argsort(1)  # of every sample in every order
    prefixes = places[:, None, :] < torch.arange(len(game.shares) + 1)[:, None]
    subsets, which = torch.unique(prefixes.flatten(0, 1), dim=0, return_inverse=True)
    changes = game.changes(subsets)[which].view(permutations, len(game.shares) + 1, -1)
    marginals = changes.diff(dim=1).gather(1, places[..., None].expand(-1, -1, changes.shape[2]))
    pairs = marginals.view(2, permutations // 2, *marginals.shape[1:]).mean(0)
    errors = pairs.std(0) / math.sqrt(len(pairs))
    return StepValues(-pairs.mean(0), errors, changes[0, 0])


def exact_shapley(game: StepGame) -> StepValues:
    """Shapley values of a step from all 2^B subsets of its samples.

    Raises:
        ValueError: More than 16 samples.

    Cost:
        2^B steps and validation passes.
    """
    count = len(game.shares)
    if count > 16:
        raise ValueError(f"game: expected at most 16 samples for all their subsets, got {count}")
    codes = torch.arange(2**count)
    members = (codes[:, None] >> torch.arange(count)) & 1 == 1
    changes, sizes = game.changes(members), members.sum(1)
    weight = torch.tensor([1.0 / (count * math.comb(count - 1, size)) for size in range(count)], dtype=torch.float64)
    values = torch.empty(count, changes.shape[1], dtype=torch.float64)
    for i in range(count):
        without = codes[~members[:, i]]
        values[i] = -weight[sizes[without]] @ (changes[without + 2**i] - changes[without])
    return StepValues(values, torch.zeros_like(values), changes[0])


class _Losses(nn.Module):
    """All validation losses of a model as one module, so that other weights can be called in."""

    def __init__(self, model: nn.Module, sets: list[Validation]) -> None:
        super().__init__()
        self.model, self._sets = model, sets

    def forward(self) -> Tensor:
        return torch.stack([loss(self.model) for loss in self._sets])


def _gradients(losses: Callable[[], Tensor], parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """(B, *shape) of every parameter that any sample reaches."""
    with torch.enable_grad():
        shares = per_sample(losses())
        rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in shares]
    found = {}
    for p, column in zip(parameters, zip(*rows, strict=True), strict=True):
        if any(gradient is not None for gradient in column):
            found[p] = torch.stack([torch.zeros_like(p) if gradient is None else gradient for gradient in column])
    return found
