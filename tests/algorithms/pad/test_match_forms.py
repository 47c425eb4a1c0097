"""The matching gradient in every form it can be had in, its options, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from algorithms.pad.case_g import BETA, problem, relative, synthetic, worst
from ghostgram.algorithms.pad import mask
from ghostgram.algorithms.pad.convnet import ConvNet
from ghostgram.algorithms.pad.flat import Flat
from ghostgram.algorithms.pad.match import match

# torch's forward mode loads decompositions of its own by a function that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

P = Flat(ConvNet(3, 4, 16, 2, 16)).P


def flattened(matched):
    return torch.cat([x.reshape(-1) for x in (matched.images, matched.labels, matched.beta)])


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("per_step", [False, True])
def test_inner_momentum_and_a_step_size_of_each_step(momentum, per_step):
    case = problem(6, momentum=momentum)
    beta = torch.linspace(0.005, 0.03, 6, dtype=torch.float64) if per_step else BETA / 2
    full = match(case, *synthetic(), beta, "full")
    assert full.beta.shape == ((6,) if per_step else ())
    assert worst(match(case, *synthetic(), beta), full) < 1e-12
    assert worst(match(case, *synthetic(), beta, store="sqrt", second="jvp"), full) < 1e-11
    assert relative(match(replace(case, momentum=0.0), *synthetic(), beta).images, full.images) > 0.1


def test_a_step_size_of_each_step_has_a_gradient_of_its_own():
    beta = torch.linspace(0.005, 0.03, 7, dtype=torch.float64)
    exact, full = (match(problem(7), *synthetic(), beta, gradient) for gradient in ("exact", "full"))
    assert exact.beta.shape == (7,)
    assert worst(exact, full) < 1e-12
    equal = match(problem(7), *synthetic(), torch.full((7,), BETA, dtype=torch.float64))
    assert relative(equal.beta.sum(), match(problem(7), *synthetic(), BETA).beta) < 1e-12


def test_hard_and_fixed_labels():
    images, logits = synthetic()
    case, classes = problem(5), logits.argmax(1)
    exact, full = (match(case, images, classes, BETA, gradient) for gradient in ("exact", "full"))
    assert exact.labels is None
    assert worst(exact, full) < 1e-12
    assert relative(match(case, images, classes, BETA, second="jvp").images, exact.images) < 1e-11
    sure = match(case, images, 80.0 * nn.functional.one_hot(classes, 4).double(), BETA)
    assert worst(exact, sure) < 1e-12
    fixed = match(case, images, logits, BETA, learn_labels=False)
    assert fixed.labels is None
    assert fixed.images.equal(match(case, images, logits, BETA).images)


@pytest.mark.parametrize("gradient", ["exact", "tesla"])
def test_the_forms_of_a_gradient_agree(gradient):
    case, (images, labels) = problem(4), synthetic()
    plain = match(case, images, labels, BETA, gradient)
    for second in ("layers", "double_backward", "jvp"):
        assert worst(match(case, images, labels, BETA, gradient, second=second), plain) < 1e-11
    for chunk in (1, 2, 5):
        assert worst(match(case, images, labels, BETA, gradient, chunk=chunk), plain) < 1e-11
    for store in ("sqrt", "host"):
        other = match(case, images, labels, BETA, gradient, store=store)
        assert flattened(other).equal(flattened(plain))
        assert other.loss == plain.loss


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9, 10])
def test_segments_of_any_length(steps):
    case = problem(steps, momentum=0.5)
    stores = [match(case, *synthetic(), BETA, store=store) for store in ("all", "sqrt")]
    assert flattened(stores[0]).equal(flattened(stores[1]))


def test_an_image_may_occur_several_times_in_a_batch():
    case = replace(problem(3), batches=lambda step: torch.tensor([4, 4, step, 0, 4]))
    exact, full = (match(case, *synthetic(), BETA, gradient) for gradient in ("exact", "full"))
    assert worst(exact, full) < 1e-12
    assert (exact.images.flatten(1).norm(dim=1) > 0).nonzero()[:, 0].tolist() == [0, 1, 2, 4]


def test_a_call_leaves_its_arguments_and_global_state_alone():
    case, (images, labels) = problem(3), synthetic()
    images.requires_grad_()
    arguments = [images, labels, case.start, case.target, *case.flat.module.parameters()]
    before = [x.detach().clone() for x in arguments]
    state = torch.get_rng_state()
    with torch.no_grad():
        matched = match(case, images, labels, BETA)
    assert all(x.equal(y) for x, y in zip(arguments, before, strict=True))
    assert all(x.grad is None for x in arguments)
    assert not any(x.requires_grad for x in matched[1:])
    assert torch.equal(state, torch.get_rng_state())
    assert flattened(matched).equal(flattened(match(case, images, labels, torch.tensor(BETA, dtype=torch.float64))))


def dropping(case):
    case.flat.module.fc = nn.Sequential(nn.Dropout(), case.flat.module.fc)
    flat = Flat(case.flat.module)
    return replace(case, flat=flat)


@pytest.mark.filterwarnings("ignore:second")
@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda case: replace(case, target=case.start), {}, ValueError, "start: expected to differ from target"),
        (
            lambda case: replace(case, start=case.start.half()),
            {},
            ValueError,
            "start: expected float32 or float64, got",
        ),
        (lambda case: replace(case, steps=0), {}, ValueError, "steps: expected at least 1, got 0"),
        (lambda case: replace(case, momentum=1.0), {}, ValueError, "momentum: expected 0 <= momentum < 1, got 1.0"),
        (lambda case: replace(case, target=case.target[1:]), {}, ValueError, rf"target: expected \({P},\)"),
        (lambda case: replace(case, batches=lambda i: torch.empty(0).long()), {}, ValueError, "batches: expected .B,."),
        (dropping, {}, ValueError, "problem: expected a student and an augmentation that draw no random numbers"),
        (None, {"gradient": "truncated"}, ValueError, r"gradient: expected one of \('exact', 'full', 'tesla'\)"),
        (None, {"gradient": "full", "store": "sqrt"}, ValueError, "gradient: expected 'exact' or 'tesla' with store"),
        (None, {"store": "disk"}, ValueError, "store: expected one of .* got 'disk'"),
        (None, {"second": "hvp"}, ValueError, "second: expected one of .* got 'hvp'"),
        (None, {"chunk": 0}, ValueError, "chunk: expected at least 1, got 0"),
        (None, {"images": torch.zeros(12, 3, 16, 16)}, TypeError, "images: expected torch.float64 on cpu"),
        (None, {"labels": torch.zeros(12, 4).int()}, TypeError, "labels: expected torch.float64 logits or int64 cla"),
        (None, {"labels": torch.zeros(11).long()}, ValueError, r"labels: expected \(n,\) classes for n = 12 images"),
        (None, {"beta": torch.zeros(3)}, ValueError, r"beta: expected a number or \(2,\), got \(3,\)"),
    ],
)
def test_bad_input_is_named(change, options, error, message):
    images, labels = synthetic()
    given = {"images": images, "labels": labels, "beta": BETA} | options
    with pytest.raises(error, match=message):
        case = problem(2)
        match(change(case) if change else case, **given)


@pytest.mark.filterwarnings("ignore:second")
def test_a_student_that_looks_at_the_batch_is_not_chunked():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768, track_running_stats=False), nn.Linear(768, 4)).double()
    flat = Flat(net)
    start = flat.vector(net)
    case = replace(problem(2, masked=mask.none()), flat=flat, start=start, target=start + 0.1)
    assert worst(match(case, *synthetic(), BETA), match(case, *synthetic(), BETA, "full")) < 1e-12
    with pytest.raises(ValueError, match="chunk: expected None, got 2: '1' of the student takes statistics of the bat"):
        match(case, *synthetic(), BETA, chunk=2)
