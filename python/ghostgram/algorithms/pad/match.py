"""The matching loss of trajectory matching and its gradient by the synthetic images, their labels and the step size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ghostgram.algorithms.pad.full import by_full_graph
from ghostgram.algorithms.pad.inner import Inner, Problem
from ghostgram.algorithms.pad.reverse import Store, by_reverse
from ghostgram.algorithms.pad.second import Second, form_of

Gradient = Literal["exact", "full", "tesla"]


class Matched(NamedTuple):
    """What `match` returns."""

    loss: float
    """L = num / D."""
    images: Tensor
    """dL/dX, like the images."""
    labels: Tensor | None
    """dL/dY, like the label logits; None for hard or fixed labels."""
    beta: Tensor
    """dL/dbeta: a scalar, or (N,) for a step size of each step."""
    student: Tensor
    """(P,) theta_N, where the student has arrived."""


def match(
    problem: Problem,
    images: Tensor,
    labels: Tensor,
    beta: Tensor | float,
    gradient: Gradient = "exact",
    *,
    learn_labels: bool = True,
    store: Store = "all",
    chunk: int | None = None,
    second: Second = "auto",
) -> Matched:
    r"""How far N steps on a synthetic set end from an expert's later weights, and how the set should change.

        L = sum_j m_j (theta_N - theta*)_j^2 / sum_j m_j (theta_0 - theta*)_j^2,
        theta_{i+1} = theta_i - beta grad l(theta_i; A_i(X_b), Y_b),    b the batch of step i,

    with l the mean cross-entropy against softmax(Y_b), or against classes.

    Args:
        problem: The expert's stretch, the student and its steps.
        images: (n, ...) X, of the dtype and on the device of the student's weights.
        labels: (n, classes) logits Y, of that dtype; or (n,) int64 classes.
        beta: The step size: a number, or (N,), one for each step.
        gradient: "exact" goes back over the steps with the graph of one of them; "full" differentiates all steps as one
            graph and gives the same; "tesla" leaves out that later weights depend on earlier batches, and is an
            approximation.
        learn_labels: Whether dL/dY is wanted of soft labels.
        store: Which weights "exact" and "tesla" keep for the way back: "all", "sqrt" (every ceil(sqrt N)-th; the others
            are computed again), or "host" (all of them in CPU memory). The results are the same to the bit.
        chunk: At most so many images at once, for less memory. Exact for a student that treats images independently.
        second: How "exact" and "tesla" have their second derivatives, to rounding the same: "layers" by closed forms,
            for a ConvNet or an nn.Sequential of its layers; "double_backward"; "jvp", a backward through a forward-mode
            derivative; "auto" is "layers" where these are known, and otherwise "double_backward", with a warning.

    Returns:
        The loss and its gradients, without graphs.

    Raises:
        TypeError: Dtypes differ.
        ValueError: Shapes do not fit; an option is unknown, or is one that "full" has no use for; start and target are
            the same; the student cannot be chunked; or it or the augmentation draws random numbers, so that steps
            cannot be replayed.

    Cost:
        In units of a forward pass of the N B images: 11 for "exact" (3 on the way forward, 8 of closed forms, which are
        9 of a double backward), 9 for "full", another 3 with "sqrt". Memory beside the set: "exact" what one step or
        chunk needs and (N + 1) P scalars (on the host for "host", 2 sqrt(N) P for "sqrt"), "full" the graphs of N
        steps. Momentum doubles the scalars.

    Source:
        The loss is MTT's (arXiv 2203.11932), masks are PAD's (arXiv 2408.03360), "tesla" is TESLA's (arXiv
        2211.10586); docs/algorithms/pad_gradient.md derives the exact sweep.
    """
    for name, value, known in (("gradient", gradient, Gradient), ("store", store, Store), ("second", second, Second)):
        if value not in get_args(known):
            raise ValueError(f"{name}: expected one of {get_args(known)}, got {value!r}")
    if gradient == "full" and (store, second) != ("all", "auto"):
        raise ValueError(f"gradient: expected 'exact' or 'tesla' with store={store!r}, second={second!r}, got 'full'")
    step_sizes = torch.as_tensor(beta, dtype=problem.start.dtype, device=problem.start.device).detach()
    _check_set(problem, images, labels, step_sizes)
    _check_chunk(problem.flat.module, chunk)
    inner = Inner(problem, images.detach(), labels.detach(), step_sizes.expand(problem.steps).clone(), chunk)
    with torch.enable_grad(), _no_random_numbers(images.device):
        if gradient == "full":
            found = by_full_graph(inner)
        else:
            found = by_reverse(inner, store, form_of(second, problem.flat), through_weights=gradient == "exact")
    by_beta = found.beta if step_sizes.ndim else found.beta.sum(dtype=torch.float64).to(found.beta.dtype)
    return Matched(float(found.loss), found.images, found.labels if learn_labels else None, by_beta, found.student)


def _check_set(problem: Problem, images: Tensor, labels: Tensor, beta: Tensor) -> None:
    """Raises unless the synthetic set fits the problem."""
    theta = problem.start
    if (images.dtype, images.device) != (theta.dtype, theta.device):
        raise TypeError(
            f"images: expected {theta.dtype} on {theta.device} like the weights, got {images.dtype} on {images.device}"
        )
    if labels.dtype not in (theta.dtype, torch.int64) or labels.device != theta.device:
        raise TypeError(
            f"labels: expected {theta.dtype} logits or int64 classes on {theta.device}, got {labels.dtype} on "
            f"{labels.device}"
        )
    wanted = "(n,) classes" if labels.dtype == torch.int64 else "(n, classes) logits"
    if labels.ndim != 1 + labels.is_floating_point() or len(labels) != len(images):
        raise ValueError(f"labels: expected {wanted} for n = {len(images)} images, got {tuple(labels.shape)}")
    if beta.shape not in ((), (problem.steps,)):
        raise ValueError(f"beta: expected a number or ({problem.steps},), got {tuple(beta.shape)}")


def _check_chunk(module: nn.Module, chunk: int | None) -> None:
    if chunk is None:
        return
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            raise ValueError(
                f"chunk: expected None, got {chunk}: {name!r} of the student takes statistics of the batch"
            )


@contextmanager
def _no_random_numbers(device: torch.device) -> Iterator[None]:
    """Raises if torch's global generators have moved: then a step cannot be replayed."""
    read = [torch.get_rng_state] + ([lambda: torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    before = [state() for state in read]
    yield
    if not all(torch.equal(state(), was) for state, was in zip(read, before, strict=True)):
        raise ValueError(
            "problem: expected a student and an augmentation that draw no random numbers, got some drawn from torch's "
            "global generator: steps are replayed, so use eval mode for dropout and keyed draws for augmentation"
        )
