"""Second derivatives in closed form: of every layer, against autograd; and students that have none are named."""

import multiprocessing
import warnings

import pytest
import torch
from peers import memory
from torch import nn

from algorithms.pad.case_g import BETA, problem, relative, rotated_and_contrasted, synthetic
from algorithms.pad.footprint import peaks_beside_kept_weights
from ghostgram.algorithms.pad import mask
from ghostgram.algorithms.pad.convnet import ConvNet
from ghostgram.algorithms.pad.flat import Flat
from ghostgram.algorithms.pad.inner import Inner, Problem
from ghostgram.algorithms.pad.match import match
from ghostgram.algorithms.pad.second import double_backward, form_of

BATCH = torch.tensor([3, 1, 3, 7])


def head():
    return nn.Flatten(), nn.LazyLinear(4)


STUDENTS = {
    "ConvNet": lambda: ConvNet(3, 4, 6, 2, 16),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 4)),
    "MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 5), nn.ReLU(), nn.Linear(5, 4, bias=False)),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU()), *head()),
    "in place": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), *head()),
    "groups of channels": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), *head()),
    "norms and ReLUs first": lambda: nn.Sequential(
        nn.ReLU(), nn.GroupNorm(1, 3), nn.GroupNorm(3, 3, eps=0.1), nn.Conv2d(3, 2, 3), *head()
    ),
    "norm of vectors": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.GroupNorm(2, 6), nn.Linear(6, 4)),
    "strides, groups, dilation": lambda: nn.Sequential(
        nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=1, groups=3, bias=False),
        nn.Conv2d(6, 4, 3, dilation=2),
        nn.AvgPool2d((3, 2), stride=2, padding=1, ceil_mode=True, count_include_pad=False),
        *head(),
    ),
}


def passes(net, dtype, hard=False):
    """s and its derivatives by autograd and by closed forms, of a batch with an image twice."""
    images, labels = synthetic(dtype)
    net(images.float())  # lazy layers learn their sizes
    flat = Flat(net.to(dtype))
    theta = flat.vector(net)
    direction = torch.randn(flat.P, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    case = Problem(flat, theta, theta + direction, mask.none(), 1, lambda step: BATCH, rotated_and_contrasted)
    inner = Inner(case, images, labels.argmax(1) if hard else labels, torch.ones(1, dtype=dtype), None)
    (piece,) = inner.pieces(0)
    return [form(inner, 0, piece, theta, direction) for form in (double_backward, form_of("layers", flat))]


def check(net, dtype, tolerance, **options):
    (s, by), (got_s, got) = passes(net, dtype, **options)
    assert got.keys() == by.keys()
    errors = {"s": relative(got_s, s)} | {name: relative(got[name], u) for name, u in by.items()}
    assert {name: error for name, error in errors.items() if not error < tolerance} == {}


@pytest.mark.parametrize("name", STUDENTS)
def test_closed_forms_are_autograds(name):
    torch.manual_seed(0)
    check(STUDENTS[name](), torch.float64, 1e-12)


def test_closed_forms_in_float32():
    torch.manual_seed(0)
    check(STUDENTS["ConvNet"](), torch.float32, 5e-6)


def test_closed_forms_of_hard_labels():
    torch.manual_seed(0)
    check(STUDENTS["ConvNet"](), torch.float64, 1e-12, hard=True)


def test_the_default_is_closed_forms_and_says_where_there_are_none():
    case = problem(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        default, closed = (match(case, *synthetic(), BETA, **way) for way in ({}, {"second": "layers"}))
        double = match(case, *synthetic(), BETA, second="double_backward")
    assert default.images.equal(closed.images)
    assert not default.images.equal(double.images)
    case = problem(2, act=nn.GELU)
    with pytest.warns(UserWarning, match=r"second: 'double_backward' takes over .*'blocks\.0\.act', GELU"):
        default = match(case, *synthetic(), BETA)
    assert default.images.equal(match(case, *synthetic(), BETA, second="double_backward").images)


class Own(ConvNet):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    net[1].register_forward_hook(lambda module, args, out: 2 * out)
    return net


def shared():
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    net[4].weight = net[3].weight
    return net


def frozen():
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.Linear(4, 4))
    net[1].requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Own(3, 4, 4, 1, 16), "''.*, Own"),
        (hooked, "'1' has hooks"),
        (shared, "every layer's parameters once and trainable"),
        (frozen, "every layer's parameters once and trainable"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding_mode="reflect")), "'0', Conv2d"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same")), "'0', Conv2d"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4, affine=False)), "'1', GroupNorm"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2)), "'1', Flatten"),
    ],
)
def test_students_without_closed_forms_are_named(make, why):
    with pytest.raises(ValueError, match=f"second: expected 'double_backward' or 'jvp' for this student.*{why}"):
        form_of("layers", Flat(make()))


@pytest.mark.skipif(not memory.RESET.exists(), reason="the high-water mark of memory is read as Linux shows it")
def test_memory_does_not_grow_with_steps():
    with multiprocessing.get_context("spawn").Pool(1) as fresh:  # what other tests have left free would hide it
        peaks = fresh.apply(peaks_beside_kept_weights, [(5, 40)])
    assert peaks[5] > 10  # MiB: enough for what else is allocated not to matter
    assert peaks[40] < 1.05 * peaks[5]
