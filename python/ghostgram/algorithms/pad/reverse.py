"""The gradient of the matching loss by reverse accumulation: one step's graph at a time, whatever N is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ghostgram.algorithms.pad.inner import Inner, State
from ghostgram.algorithms.pad.second import Form
from ghostgram.ops import trajectory_match

Store = Literal["all", "sqrt", "host"]


class Gradients(NamedTuple):
    """The matching loss and its gradients by the synthetic set."""

    loss: Tensor
    """(): num / D."""
    images: Tensor
    """Like X."""
    labels: Tensor | None
    """Like Y; None for hard labels."""
    beta: Tensor
    """(N,): by the step size of every step."""
    student: Tensor
    """(P,): theta_N."""


def by_reverse(inner: Inner, store: Store, form: Form, through_weights: bool) -> Gradients:
    """Runs the inner loop without a graph, then walks back over it.

    Let lambda be dL/dtheta_{i+1}. Step i gives s = d . g_i for a direction d, and the derivatives u of s, by one
    second-order pass over its batch. Without momentum d = lambda and

        dL/dX_b -= beta_i u_x,  dL/dY_b -= beta_i u_y,  dL/dbeta_i = -s,  lambda -= beta_i u_theta;

    with momentum d = nu, where nu <- mu nu - beta_i lambda (0 past the end), and

        dL/dX_b += u_x,  dL/dY_b += u_y,  dL/dbeta_i = -lambda . v_{i+1},  lambda += u_theta.

    Args:
        inner: The loop.
        store: Which states are kept for the way back, and where.
        form: How s and u are had.
        through_weights: Whether lambda is updated. If it stays dL/dtheta_N, the gradient is TESLA's: it leaves out
            that later weights depend on earlier batches.
    """
    problem, mu = inner.problem, inner.problem.momentum
    trajectory = _Trajectory(inner, store)
    after = trajectory.end
    student = after.theta
    mask = problem.mask.weights(problem.flat, student, problem.target)
    found = trajectory_match.trajectory_match_grad(student, problem.start, problem.target, mask)
    along: Tensor = found.gradient  # type: ignore[assignment]  # one tensor was given, so it is one

    by = {name: torch.zeros_like(x) for name, x in inner.learned.items()}
    by_beta, nu = torch.zeros_like(inner.beta), torch.zeros_like(along)
    for i, before in trajectory.backwards():
        nu = mu * nu - inner.beta[i] * along
        direction, scale = (nu, 1.0) if mu else (along, -inner.beta[i])
        slope, by_theta = torch.zeros_like(inner.beta[i]), torch.zeros_like(along)
        for piece in inner.pieces(i):
            s, u = form(inner, i, piece, before.theta, direction)
            for name, total in by.items():
                total.index_add_(0, piece.indices, scale * u[name])
            if through_weights:
                by_theta += u["theta"]
            slope += s
        by_beta[i] = -slope if after.v is None else -along @ after.v
        along = along + scale * by_theta
        after = before
    return Gradients(found.loss, by["images"], by.get("labels"), by_beta, student)


class _Trajectory:
    """The states of the inner loop, to be walked back over."""

    def __init__(self, inner: Inner, store: Store) -> None:
        steps, theta, on_host = inner.problem.steps, inner.problem.start, store == "host"
        self._inner = inner
        self._every = math.ceil(math.sqrt(steps)) if store == "sqrt" else 1
        # One piece of memory. Many of them, made between a step's own, would keep those from being given back.
        self._kept = torch.empty(
            *(math.ceil(steps / self._every), 2 if inner.problem.momentum else 1, len(theta)),
            dtype=theta.dtype,
            device="cpu" if on_host else theta.device,
            pin_memory=on_host and theta.is_cuda,
        )
        self.end = inner.start()
        for i, state in enumerate(inner.run(self.end, 0, steps)):
            if i % self._every == 0:
                for kept, part in zip(self._kept[i // self._every], self.end, strict=False):
                    kept.copy_(part, non_blocking=True)
            self.end = state

    def backwards(self) -> Iterator[tuple[int, State]]:
        """(i, the state before step i), from the last step to the first."""
        last = self._inner.problem.steps
        for k in reversed(range(len(self._kept))):
            theta, *v = self._kept[k].to(self.end.theta.device, non_blocking=True)
            first, state = k * self._every, State(theta, *v or [None])
            stretch = [state, *self._inner.run(state, first, last - 1)]
            for i in reversed(range(first, last)):
                yield i, stretch.pop()
            last = first
