"""Why one step of a ledger misses: the validation losses along the step, and the values that come of it.

    python benchmarks/algorithms/in_run_shapley/worst_step.py --lr 1e-3 --step 41     # minutes

Repeats a run of ledger.py up to a step. The ledger measures the change from w to w + h, the step without the batch;
what it predicts is the change from there to w + Delta, f(s) = l(w + h + s (Delta - h)), by slopes f' in the middles of
1, 3, 9 or 27 equal parts of the line. Shown are f, what each number of parts leaves, the same at smaller learning
rates, and how far the values are from Shapley values of the optimizer's own step, sampled by permutations.
"""

from __future__ import annotations

import argparse

import common
import ledger
import numpy as np
import torch
from torch import Tensor

from ghostgram.algorithms.in_run_shapley.fidelity import agreement
from ghostgram.algorithms.in_run_shapley.monte_carlo import StepGame, monte_carlo_shapley
from ghostgram.training.secant import secant

PARTS, SHARES, POINTS = (1, 3, 9, 27), (1.0, 0.5, 0.25), 8


class Step:
    """The step that the optimizer is about to take: h and Delta - h, flat, and the losses on the line between them."""

    def __init__(self, learner: common.Learner, windows: Tensor, validation: dict[str, Tensor]) -> None:
        parameters = list(learner.model.parameters())
        loss = common.window_losses(learner.model, windows).mean()
        norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).norm()
        self.clip = min(1.0, float(common.MAX_NORM / norm))
        self.game = StepGame(
            learner.model,
            learner.optimizer,
            lambda: common.window_losses(learner.model, windows) * self.clip / len(windows),
            {name: common.mean_loss(held_out) for name, held_out in validation.items()},
            together=8,
        )
        G = self.game.shares.sum(0)
        moved = list(self.game.moved)
        parts = secant(learner.optimizer, learner.optimizer.param_groups[0], moved, list(self.game.split(G).values()))
        self.P = torch.cat([each.P.flatten() for each in parts])
        self.h = torch.cat([each.h.flatten() for each in parts])
        self.line = -self.P * G

    def change(self, s: float, share: float = 1.0) -> Tensor:
        """(K,) change of the losses from w to w + h + s (Delta - h), at a share of the learning rate."""
        with torch.no_grad():
            return self.game.losses_at(share * (self.h + s * self.line)) - self.game.before

    def slope(self, s: float, share: float = 1.0) -> Tensor:
        """(K, n) gradients of the losses there."""
        at = (share * (self.h + s * self.line)).requires_grad_()
        losses = self.game.losses_at(at)
        return torch.stack([torch.autograd.grad(loss, at, retain_graph=True)[0] for loss in losses])

    def gradient(self, parts: int, share: float = 1.0) -> Tensor:
        """(K, n) their mean over the middles of equal parts of the line."""
        return torch.stack([self.slope((part + 0.5) / parts, share) for part in range(parts)]).mean(0)


def lengths(learner: common.Learner) -> tuple[float, float]:
    """|h| and |Delta - h| of the step that the optimizer is about to take, its gradients being there."""
    parameters = list(learner.model.parameters())
    grads = [p.grad for p in parameters]
    steps = secant(learner.optimizer, learner.optimizer.param_groups[0], parameters, grads)
    parts = [(h, P * g) for (P, h), g in zip(steps, grads, strict=True)]
    return tuple(float(torch.cat([each.flatten() for each in column]).norm()) for column in zip(*parts, strict=True))


def run(model: str, lr: float, number: int, permutations: int) -> None:
    trained = ledger.Run(model, lr, "order 2")
    earlier: list[tuple[float, float]] = []
    trained.learner.optimizer.register_step_pre_hook(lambda *_: earlier.append(lengths(trained.learner)))
    for ids, windows in trained.batches[:number]:
        trained.learner.step(windows, trained.shapley.step(ids=ids))
    step = Step(trained.learner, trained.batches[number][1], trained.validation)
    median = np.median(earlier[common.WARM_UP :], axis=0)
    print(f"step {number}: clip {step.clip:.3f}, |Delta| {(step.h + step.line).norm():.3f}")
    print(f"  |h| {step.h.norm():.3f}, |Delta - h| {step.line.norm():.3f}; "
          f"medians since the warm-up {median[0]:.3f}, {median[1]:.3f}")  # fmt: skip
    means = {share: {parts: step.gradient(parts, share) for parts in PARTS} for share in SHARES}
    truth = monte_carlo_shapley(step.game, permutations)
    for k, name in enumerate(trained.validation):
        points = [float(step.change(i / POINTS)[k]) for i in range(POINTS + 1)]
        print(f"{name}: change of the loss at s = 0, 1/{POINTS}, ...: {' '.join(f'{point:+.3f}' for point in points)}")
        slopes = step.game.split(step.line * step.slope(0.0)[k])
        by_parameter = {step.game.moved[p]: float(each.sum()) for p, each in slopes.items()}
        steepest = sorted(by_parameter, key=by_parameter.__getitem__)[:3]
        print("  slope at s = 0:", ", ".join(f"{parameter} {by_parameter[parameter]:+.2f}" for parameter in steepest))
        for share in SHARES:
            history, end = float(step.change(0.0, share)[k]), float(step.change(1.0, share)[k])
            left = [end - history - share * float(means[share][parts][k] @ step.line) for parts in PARTS]
            print(f"  at {share:g} of the rate: history {history:+.4f}, line {end - history:+.4f}, left by {PARTS}",
                  f"{' '.join(f'{residual:+.4f}' for residual in left)}")  # fmt: skip
        errors = float(truth.errors[:, k].square().mean().sqrt() / truth.values[:, k].square().mean().sqrt())
        print(f"  values against {permutations} permutations, whose standard error is {errors:.2f} of their size")
        for parts in PARTS:
            values = (step.game.shares * step.P) @ means[1.0][parts][k]
            found = agreement(values.double(), truth.values[:, k])
            print(f"    {parts} parts: Pearson {found.pearson:+.3f}, relative error {found.relative_rmse:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=ledger.MODELS, default="small")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--step", type=int, default=41)
    parser.add_argument("--permutations", type=int, default=48)
    options = parser.parse_args()
    run(options.model, options.lr, options.step, options.permutations)
