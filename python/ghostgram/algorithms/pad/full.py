"""The gradient of the matching loss by one graph of all steps: what reverse accumulation is measured against."""

from __future__ import annotations

from dataclasses import replace

import torch

from ghostgram.algorithms.pad.inner import Inner
from ghostgram.algorithms.pad.reverse import Gradients
from ghostgram.ops import trajectory_match


def by_full_graph(inner: Inner) -> Gradients:
    """Differentiates the inner loop as a whole by autograd: memory grows with N.

    Source:
        MTT (arXiv 2203.11932).
    """
    images, beta = (x.detach().requires_grad_() for x in (inner.images, inner.beta))
    labels = inner.labels.detach().requires_grad_(inner.soft)
    leaves, problem = replace(inner, images=images, labels=labels, beta=beta), inner.problem
    start = leaves.start()
    start.theta.requires_grad_()  # so the gradient of every step is part of a graph
    *_, end = leaves.run(start, 0, problem.steps)
    student = end.theta.detach()
    mask = problem.mask.weights(problem.flat, student, problem.target)
    loss = trajectory_match.trajectory_match(end.theta, problem.start, problem.target, mask)
    wanted = [images, beta, *([labels] if inner.soft else [])]
    by_images, by_beta, *by_labels = torch.autograd.grad(loss, wanted)
    return Gradients(loss.detach(), by_images, by_labels[0] if by_labels else None, by_beta, student)
