"""Masks: the cuts of the specification, nested and counted exactly, and two that published code takes for one."""

import numpy as np
import pytest
import torch
from torch import nn

import ghostgram as gg
from ghostgram.algorithms.pad import mask
from ghostgram.algorithms.pad.convnet import ConvNet
from ghostgram.algorithms.pad.flat import Flat

C10, C100 = {"channels": 3, "classes": 10}, {"channels": 3, "classes": 100}
TINY = {"channels": 3, "classes": 200, "depth": 4, "size": 64}
SMALL = Flat(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(2, 2), nn.Flatten(), nn.Linear(8, 3)))  # P = 18+2+4+27


def weights(chosen, flat=SMALL, student=None, target=None):
    """m as numbers."""
    student, target = (torch.zeros(flat.P) if x is None else x for x in (student, target))
    m = chosen.weights(flat, student, target)
    if m is None:
        return torch.ones(flat.P)
    return (torch.arange(flat.P) >= m).float() if isinstance(m, int) else m.float()


@pytest.mark.parametrize(
    ("form", "alpha", "k", "tensor", "hit", "share"),
    [
        (C10, 0.25, 80_002, 3_840, "blocks.1.conv.weight", 51.7),
        (C10, 0.5, 160_005, 151_680, "blocks.2.conv.weight", 5.6),
        (C10, 0.75, 240_007, 151_680, "blocks.2.conv.weight", 59.9),
        (C100, 0.25, 126_105, 3_840, "blocks.1.conv.weight", 82.9),
        (C100, 0.5, 252_210, 151_680, "blocks.2.conv.weight", 68.2),
        (C100, 0.75, 378_315, 299_520, "fc.weight", 38.5),
        (TINY, 0.25, 214_290, 151_680, "blocks.2.conv.weight", 42.5),
        (TINY, 0.5, 428_580, 299_520, "blocks.3.conv.weight", 87.5),
        (TINY, 0.75, 642_870, 447_360, "fc.weight", 47.7),
    ],
)
def test_the_cuts_of_published_students(form, alpha, k, tensor, hit, share):
    flat = Flat(ConvNet(**form))
    at = torch.empty(flat.P)
    assert mask.depth(alpha).weights(flat, at, at) == k
    assert mask.depth(alpha, "tensor").weights(flat, at, at) == tensor
    assert mask.depth(alpha, "block").weights(flat, at, at) == tensor  # both cut where a filter or matrix begins
    index = flat.names.index(hit)
    dropped = 100 * (k - flat.offsets[index]) / flat.shapes[index].numel()
    assert dropped == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(
    ("k", "tensor", "block"), [(17, 0, 0), (18, 18, 0), (21, 20, 0), (23, 22, 0), (24, 24, 24), (50, 48, 24)]
)
def test_alignment_never_drops_more_than_asked(k, tensor, block):
    alpha = f"{k}/51"
    at = torch.empty(51)
    assert [mask.depth(alpha, align).weights(SMALL, at, at) for align in ("scalar", "tensor", "block")] == [
        k, tensor, block
    ]  # fmt: skip


def test_a_share_is_the_decimal_number_that_is_read():
    flat = Flat(nn.Linear(99, 1))
    assert mask.depth(0.29).weights(flat, torch.empty(100), torch.empty(100)) == 29  # int(.29 * 100) is 28
    assert weights(mask.by_error("0.29"), flat).sum() == 71


@pytest.mark.parametrize("make", [mask.depth, mask.by_error])
def test_masks_are_nested_and_their_sums_fall(make):
    chance = torch.Generator().manual_seed(0)
    student, start, target = torch.randn(3, SMALL.P, generator=chance)
    before, terms = torch.ones(SMALL.P), (np.inf, np.inf)
    for dropped in range(SMALL.P):
        m = weights(make(f"{dropped}/{SMALL.P}"), SMALL, student, target)
        assert m.sum() == SMALL.P - dropped
        assert (m <= before).all()
        now = [float((m * (x - target).double() ** 2).sum()) for x in (student, start)]
        assert all(term <= earlier + 1e-12 for term, earlier in zip(now, terms, strict=True))
        before, terms = m, now
    assert weights(make(0), SMALL, student, target).equal(weights(mask.none()))


def test_errors_that_are_kept_are_the_larger_ones_and_ties_go_by_number():
    target = torch.zeros(SMALL.P)
    student = torch.randn(SMALL.P, generator=torch.Generator().manual_seed(1))
    student[:20] = student[0]
    kept = weights(mask.by_error(0.5), SMALL, student, target).bool()
    assert (student[kept].abs().min() >= student[~kept].abs().max()).all()
    equal = weights(mask.by_error("20/51"), SMALL, torch.full((SMALL.P,), -0.3), target)
    assert equal.equal(weights(mask.depth("20/51")))  # of equal errors the tail is kept
    tiny = torch.full((SMALL.P,), 1e-30)
    tiny[-20:] = 0.5e-30  # whose squares are 0 in float32
    assert weights(mask.by_error("20/51"), SMALL, tiny, target).equal(1.0 * (torch.arange(SMALL.P) < 31))


def test_by_depth_and_by_error_are_two_masks():
    """Published code keeps scalars by their error, under the name of the depth mask."""
    student, start, target = torch.zeros(51), torch.ones(51), torch.zeros(51)
    student[:24], student[24:] = 2.0, 1.0  # what matches worst is shallow
    loss = {
        name: float(gg.trajectory_match(student, start, target, make("24/51").weights(SMALL, student, target)))
        for name, make in (("depth", mask.depth), ("error", mask.by_error))
    }
    assert loss["depth"] == float(((student - target)[24:] ** 2).sum() / ((start - target)[24:] ** 2).sum()) == 1
    by_hand = np.argsort(((student - target) ** 2).numpy(), kind="stable")[24:]
    expected = ((student - target)[by_hand] ** 2).sum() / ((start - target)[by_hand] ** 2).sum()
    assert loss["error"] == pytest.approx(float(expected), rel=1e-6)
    assert loss["error"] > 2


def test_weights_of_ones_own():
    chance = torch.Generator().manual_seed(2)
    student, start, target, own = torch.rand(4, 51, generator=chance, dtype=torch.float64)
    match = lambda m: float(gg.trajectory_match(student, start, target, m.weights(SMALL, student, target)))  # noqa: E731
    expected = (own * (student - target) ** 2).sum() / (own * (start - target) ** 2).sum()
    assert match(mask.custom(own)) == pytest.approx(float(expected), rel=1e-14)
    assert match(mask.custom((own > 0.5).double())) == match(mask.custom(own > 0.5))
    assert match(mask.custom(["3.*"])) == match(mask.depth("24/51"))
    assert weights(mask.custom(["*.weight"])).nonzero()[:, 0].tolist() == [*range(18), 20, 21, *range(24, 48)]


@pytest.mark.parametrize("make", [mask.depth, mask.by_error])
@pytest.mark.parametrize("alpha", [1, -0.1, "1.5"])
def test_a_share_that_is_none_is_refused(make, alpha):
    with pytest.raises(ValueError, match=f"alpha: expected 0 <= alpha < 1, got {alpha}"):
        make(alpha)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"align: expected one of .*, got 'layer'"):
        mask.depth(0.5, "layer")
    with pytest.raises(ValueError, match=r"chosen: expected shape \(51,\), got \(50,\)"):
        weights(mask.custom(torch.ones(50)))
    with pytest.raises(ValueError, match=r"chosen: expected every pattern to match one of .*, got 'head\.\*'"):
        weights(mask.custom(["3.*", "head.*"]))
    with pytest.raises(ValueError, match=r"chosen: expected .* a list of patterns, got 'fc'"):
        mask.custom("fc")
    with pytest.raises(ValueError, match="mask: expected some weight above 0"):
        nothing = mask.custom(torch.zeros(51)).weights(SMALL, torch.ones(51), torch.zeros(51))
        gg.trajectory_match(torch.ones(51), torch.ones(51), torch.zeros(51), nothing)
