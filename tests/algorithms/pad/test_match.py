"""The matching gradient: exact against the full graph and central differences, and TESLA against its own formula."""

import pytest
import torch
from torch import nn

import ghostgram as gg
from algorithms.pad.case_g import ALPHA, BETA, problem, relative, synthetic, worst
from ghostgram.algorithms.pad import mask
from ghostgram.algorithms.pad.convnet import ConvNet
from ghostgram.algorithms.pad.flat import Flat
from ghostgram.algorithms.pad.inner import Inner, State
from ghostgram.algorithms.pad.match import match

P = Flat(ConvNet(3, 4, 16, 2, 16)).P
MASKS = {
    "none": mask.none(),
    "depth": mask.depth(ALPHA),
    "error": mask.by_error(ALPHA),
    "custom": mask.custom(torch.rand(P, generator=torch.Generator().manual_seed(0), dtype=torch.float64)),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("steps", [1, 5, 20, 80])
def test_exact_is_the_full_graphs_gradient(steps, name):
    case = problem(steps, masked=MASKS[name])
    exact, full = (match(case, *synthetic(), BETA, gradient) for gradient in ("exact", "full"))
    assert worst(exact, full) < 1e-12
    assert relative(exact.student, full.student) < 1e-12


@pytest.mark.parametrize(("steps", "name"), [(20, name) for name in MASKS] + [(n, "depth") for n in (1, 5, 80)])
def test_exact_in_float32(steps, name):
    double, single = (problem(steps, dtype, nn.GELU, MASKS[name]) for dtype in (torch.float64, torch.float32))
    oracle = match(single, *synthetic(torch.float32), BETA, "full")
    assert worst(oracle, match(double, *synthetic(), BETA, "full")) < 5e-6  # float32 can tell at all
    exact = match(single, *synthetic(torch.float32), BETA, second="double_backward")
    assert worst(exact, oracle) < 1e-5
    assert {x.dtype for x in exact[1:]} == {torch.float32}


def test_exact_is_what_central_differences_say():
    case, (images, labels) = problem(5, act=nn.GELU), synthetic()
    exact = match(case, images, labels, BETA, second="double_backward")
    chance = torch.Generator().manual_seed(4)

    def slope(which, at, h):
        values = []
        for sign in (1, -1):
            moved = [images.clone(), labels.clone(), torch.tensor(BETA, dtype=torch.float64)]
            moved[which].view(-1)[at] += sign * h
            *_, end = Inner(case, *moved[:2], moved[2].expand(5), None).run(State(case.start, None), 0, 5)
            values.append(float(gg.trajectory_match(end.theta, case.start, case.target, P // 2)))
        return (values[0] - values[1]) / (2 * h)

    for which, gradient in enumerate((exact.images, exact.labels)):
        for at in torch.randperm(gradient.numel(), generator=chance)[:20].tolist():
            assert slope(which, at, 1e-5) == pytest.approx(float(gradient.view(-1)[at]), rel=1e-5, abs=1e-9)
    assert slope(2, 0, 1e-6) == pytest.approx(float(exact.beta), rel=1e-5, abs=1e-9)


def gradients_of_steps(case, images, labels, beta):
    """theta_N and every g_i, by steps written out."""
    theta, gradients = case.start, []
    for i in range(case.steps):
        batch = case.batches(i)
        leaf = theta.clone().requires_grad_()
        logits = case.flat.logits(leaf, case.augment(i, images[batch], batch))
        loss = -(labels[batch].softmax(1) * logits.log_softmax(1)).sum(1).mean()
        gradients.append(torch.autograd.grad(loss, leaf, create_graph=True)[0])
        theta = theta - beta * gradients[-1].detach()
    return theta, gradients


def test_tesla_is_its_own_formula_and_not_the_gradient():
    case, beta = problem(20), torch.tensor(BETA, dtype=torch.float64, requires_grad=True)
    images, labels = (x.requires_grad_() for x in synthetic())
    tesla = match(case, images, labels, BETA, "tesla")
    _, gradients = gradients_of_steps(case, images, labels, BETA)
    m = (torch.arange(P) >= P // 2).double()  # with weights frozen at theta_i, L depends on the sum of g_i alone
    D = (m * (case.start - case.target) ** 2).sum()
    loss = (m * (case.start - beta * torch.stack(gradients).sum(0) - case.target) ** 2).sum() / D
    by_images, by_labels, by_beta = torch.autograd.grad(loss, [images, labels, beta])
    assert (
        worst(tesla, tesla._replace(images=by_images, labels=by_labels, beta=by_beta, loss=float(loss.detach())))
        < 1e-12
    )
    exact = match(case, images, labels, BETA)
    cosine = torch.cosine_similarity(tesla.images.flatten(), exact.images.flatten(), 0)
    assert 0.5 < cosine < 0.95
    assert relative(tesla.beta, exact.beta) > 0.05


def test_one_step_in_closed_form():
    case, (images, labels) = problem(1), synthetic()
    exact, tesla = (match(case, images, labels, BETA, gradient) for gradient in ("exact", "tesla"))
    student, (g,) = gradients_of_steps(case, images, labels, BETA)
    lambda_1 = gg.trajectory_match_grad(student, case.start, case.target, P // 2).gradient
    assert relative(exact.beta, -lambda_1 @ g.detach()) < 1e-12
    assert worst(tesla, exact) < 1e-12
