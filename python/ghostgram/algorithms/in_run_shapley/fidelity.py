"""How near closed forms come to the Shapley values of the real optimizer step, on models small enough to try it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ghostgram.algorithms.in_run_shapley.monte_carlo import StepGame, StepValues, Validation, monte_carlo_shapley
from ghostgram.training.linearize import Linearised, linearize, state_is_ready
from ghostgram.training.secant import secant

FORMS = {
    "proxy": ("proxy", None),
    "pre": ("pre", None),
    "post": ("post", None),
    "secant": ("secant", None),
    "post, hvp": ("post", "hvp"),
    "post, midpoint": ("post", "midpoint"),
    "secant, midpoint": ("secant", "midpoint"),
}
"""Name -> how the step is linearised, and how the loss is curved; see `closed_form`."""


class Agreement(NamedTuple):
    """How estimated values of one batch compare with the true ones."""

    pearson: float
    spearman: float
    rmse: float
    """Root mean square of the difference."""
    relative_rmse: float
    """Over the root mean square of the true values."""


def fidelity(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Callable[[], Tensor],
    validation: Validation | Mapping[str, Validation],
    *,
    forms: Sequence[str] = tuple(FORMS),
    permutations: int = 1000,
    seed: int = 0,
) -> dict[tuple[str, str], Agreement]:
    """Compares closed forms of a step's values with Monte Carlo Shapley values of the optimizer's real step.

    Call it where the optimizer is about to step; nothing is changed. The truth has neither linearisation nor frozen
    state: torch's own step on the gradient of every subset, and the validation losses after it.

    Args:
        model: A small model as it is before the step.
        optimizer: SGD, Adam or AdamW, as it is before the step.
        losses: Runs the model and returns (B,), every sample's share of the training loss.
        validation: A callable model -> scalar loss, or a dict of them.
        forms: Some of `FORMS`.
        permutations: See `monte_carlo_shapley`.
        seed: Of the permutations.

    Returns:
        (form, set) -> `Agreement`.

    Raises:
        ValueError: An unknown form; `losses()` returns no (B,) tensor.

    Cost:
        B backward passes, and up to B permutations optimizer steps and validation passes: 16000 for a batch of 16 and
        1000 permutations. Memory: B gradients, 64 models.

    Source:
        arXiv 2406.11011, Section 5 (its comparison is with the SGD step); docs/algorithms/in_run_shapley_fidelity.md.
    """
    if unknown := [form for form in forms if form not in FORMS]:
        raise ValueError(f"forms: expected some of {', '.join(map(repr, FORMS))}, got {unknown}")
    game = StepGame(model, optimizer, losses, validation)
    estimates = {form: closed_form(game, *FORMS[form]).values for form in forms}
    truth = monte_carlo_shapley(game, permutations, seed).values
    return {
        (form, name): agreement(values[:, k], truth[:, k])
        for form, values in estimates.items()
        for k, name in enumerate(game.sets)
    }


def agreement(values: Tensor, truth: Tensor) -> Agreement:
    """Compares (B,) values with the true ones; correlations are nan where either does not vary."""
    rmse, size = (float(x.square().mean().sqrt()) for x in (values - truth, truth))
    return Agreement(_pearson(values, truth), _pearson(_ranks(values), _ranks(truth)), rmse, rmse / size)


def closed_form(game: StepGame, v_state: str, curvature: str | None = None) -> StepValues:
    """Values of a step by definition, from gradients that autograd gives: `value_i = <g_i, P * q>`.

    Args:
        game: The step, linearised as `h - P * G`.
        v_state: "pre" and "post": with Adam's second moment frozen as before and after the batch (where it has none
            before, "pre" is "post"). "secant": see `secant`. "proxy": `P = lr`, `h = 0`, SGD whatever the optimizer is.
        curvature: None: q is the validation gradient at w, order 1. Order 2, `Delta = h - P * G` being the step: "hvp":
            `q = grad l(w) + 1/2 H (h + Delta)`; "midpoint": `q = grad l(w + 1/2 (h + Delta))`.

    Returns:
        The values, and as history the change of the losses by h to the same order; measured for "midpoint".

    Raises:
        ValueError: An unknown v_state or curvature.

    Cost:
        One forward and backward of every validation set, and for "midpoint" a forward; about six for "hvp".

    Source:
        arXiv 2406.11011, Theorems 3 and 4; docs/algorithms/in_run_shapley_fidelity.md.
    """
    if v_state not in ("proxy", "pre", "post", "secant"):
        raise ValueError(f"v_state: expected 'proxy', 'pre', 'post' or 'secant', got {v_state!r}")
    if curvature not in (None, "hvp", "midpoint"):
        raise ValueError(f"curvature: expected None, 'hvp' or 'midpoint', got {curvature!r}")
    P, h = _linearised(game, v_state)
    middle = h - P * game.shares.sum(0) / 2  # of the step without the batch and the step with it
    if curvature == "midpoint":
        q = _gradients(game, middle)
        with torch.no_grad():
            history = game.losses_at(h) - game.before
    else:
        q = _gradients(game, torch.zeros_like(h))
        history = q @ h
        if curvature == "hvp":
            q = q + _curvature(game, middle)
            history = history + _curvature(game, h) @ h / 2
    values = (game.shares @ (P * q).T).double().cpu()
    return StepValues(values, torch.zeros_like(values), history.double().cpu())


def _linearised(game: StepGame, v_state: str) -> tuple[Tensor, Tensor]:
    """P and h (n,) of the step."""
    whole = game.split(game.shares.sum(0))
    early = v_state == "pre" and all(state_is_ready(game.optimizer, p) for p in game.moved)
    steps: dict[nn.Parameter, Linearised] = {}
    for group in game.optimizer.param_groups:
        parameters = [p for p in group["params"] if p in game.moved]
        grads = [whole[p] for p in parameters]
        if v_state == "proxy":
            found = [Linearised(torch.full_like(p, float(group["lr"])), None) for p in parameters]
        elif v_state == "secant":
            found = secant(game.optimizer, group, parameters, grads)
        else:
            found = linearize(game.optimizer, group, parameters, None if early else grads)
        steps.update(zip(parameters, found, strict=True))
    P = torch.cat([steps[p].P.expand_as(p).flatten() for p in game.moved])
    h = torch.cat([(torch.zeros_like(p) if (h := steps[p].h) is None else h).flatten() for p in game.moved])
    return P.detach(), h.detach()


def _gradients(game: StepGame, shift: Tensor) -> Tensor:
    """(K, n) gradients of the validation losses at w + shift."""
    shift = shift.detach().requires_grad_()
    rows = [torch.autograd.grad(loss, shift, retain_graph=True)[0] for loss in game.losses_at(shift)]
    return torch.stack(rows)


def _curvature(game: StepGame, along: Tensor) -> Tensor:
    """(K, n): the Hessians of the validation losses at w times a vector."""
    shift = torch.zeros_like(along).requires_grad_()
    rows = []
    for loss in game.losses_at(shift):
        (gradient,) = torch.autograd.grad(loss, shift, create_graph=True)
        rows.append(torch.autograd.grad(gradient @ along, shift, retain_graph=True)[0])
    return torch.stack(rows)


def _pearson(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x.norm() * y.norm()))


def _ranks(x: Tensor) -> Tensor:
    """Ranks in float64; equal values share the mean of theirs."""
    _, which, counts = torch.unique(x, return_inverse=True, return_counts=True)
    middles: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return middles.double()[which]
