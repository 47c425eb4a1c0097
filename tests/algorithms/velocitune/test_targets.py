"""Targets: what is refused and what only just is not, intervals that cover, and the file."""

import dataclasses
import json
import warnings

import numpy as np
import pytest

from ghostgram.algorithms.velocitune.estimate import UnderdeterminedFit, estimate_targets
from ghostgram.algorithms.velocitune.targets import DomainTarget, Point, Targets

FULL = 1e9
SIZES = np.geomspace(1 / 64, 1 / 4, 6) * FULL
BUNCHED = np.linspace(5e7, 1.985e8, 6)
TRUE = 1.3 + 60 * FULL**-0.25
START = {"a": (2.5, 0.002)}


def plain(d):
    return 1.3 + 60 * d**-0.25


def continued(d):
    return 2.5 - 0.8 * (1 - (1 + d / 2e8) ** -0.4)


def points(law=plain, sizes=SIZES, se=0.003, seed=None):
    noise = np.zeros(len(sizes)) if seed is None else np.random.default_rng(seed).normal(0, se, len(sizes))
    return [Point(float(d), float(law(d) + e), se) for d, e in zip(sizes, noise, strict=True)]


def estimate(some=None, form="chinchilla", tokens=FULL, **options):
    return estimate_targets({"a": points() if some is None else some}, START, tokens, form, **options).by_domain["a"]


def test_a_noiseless_law_is_extrapolated():
    found = estimate()
    assert abs(found.target - TRUE) < 1e-9
    assert found.low < TRUE < found.high
    assert found.se_target == pytest.approx((found.high - found.low) / (2 * 1.645), rel=0.1)
    assert max(map(abs, found.residuals)) < 1e-9
    assert abs(found.left_out_error) < 1e-9
    assert found.flags == ()


def test_the_order_of_points_and_of_domains_does_not_matter():
    some = points(seed=0)
    both = {"a": some, "b": points(seed=1)}
    starts = {"a": (2.5, 0.002), "b": (2.5, 0.002)}
    first = estimate_targets(both, starts, FULL, "chinchilla").by_domain
    again = estimate_targets({"b": both["b"], "a": some[::-1]}, starts, FULL, "chinchilla").by_domain
    assert first == again


@pytest.mark.filterwarnings("ignore:points of 'a' scatter")
def test_intervals_cover():
    """Of 200 seeded data sets, 80 to 97 % of the 90 % intervals hold the true loss."""
    found = [estimate(points(seed=seed), resamples=100) for seed in range(200)]
    assert 0.80 <= np.mean([one.low <= TRUE <= one.high for one in found]) <= 0.97
    assert abs(np.mean([one.target for one in found]) - TRUE) < 0.002


def test_the_form_is_chosen_by_the_largest_size_left_out():
    sizes = np.geomspace(1 / 64, 1 / 4, 8) * FULL
    assert estimate(points(plain, sizes), "auto", prior=False).form == "chinchilla"
    found = estimate(points(continued, sizes), "auto", prior=False)
    assert found.form == "anchored"
    assert abs(found.target - continued(FULL)) < 1e-6
    with pytest.raises(ValueError, match="form: expected a law by name for so few points"):
        estimate(points()[:3], "auto", allow={"points", "span", "far"})


@pytest.mark.filterwarnings("ignore:points of 'a' scatter")
def test_the_plain_law_misses_a_continued_run_and_the_anchored_one_does_not():
    sizes = np.geomspace(0.0125, 0.2, 5) * FULL
    errors = {}
    for form in ("chinchilla", "anchored"):
        drawn = [points(continued, sizes, seed=seed) for seed in range(20)]
        found = [estimate(some, form, resamples=2, allow={"interval", "bound"}).target for some in drawn]
        errors[form] = np.mean(found) - continued(FULL)
    assert errors["chinchilla"] > 0.03
    assert abs(errors["anchored"]) < 0.02


@pytest.mark.parametrize(
    ("reason", "refused", "near_miss"),
    [
        ("points", points(sizes=SIZES[[0, 2, 5]]), points(sizes=SIZES[[0, 2, 3, 5]])),
        ("span", points(sizes=BUNCHED, se=1e-4), points(sizes=BUNCHED - 1e6, se=1e-4)),
        ("far", points(sizes=SIZES / 4.1, se=3e-4), points(sizes=SIZES / 3.9, se=3e-4)),
        ("interval", points(se=0.1), points(se=0.08)),
        (
            "bound",
            points(lambda d: 1.6 + 1.65 * 1.6e7**1.52 * d**-1.52, se=0.01),
            points(lambda d: 1.6 + 1.65 * 1.6e7**1.48 * d**-1.48, se=0.01),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:points of 'a'. tokens are 15.6")
def test_what_is_underdetermined_is_refused(reason, refused, near_miss):
    with pytest.raises(UnderdeterminedFit, match="points of 'a': expected") as raised:
        estimate(refused)
    assert (raised.value.domain, raised.value.reason) == ("a", reason)
    if reason != "points":
        assert reason in estimate(refused, allow={reason}).flags
    assert reason not in estimate(near_miss).flags


def test_model_sizes_are_asked_for():
    law = {(n, d): 1.5 + 400 * n**-0.34 + 410 * d**-0.28 for n in (1e7, 3e7, 1e8) for d in (1e8, 3e8, 1e9, 3e9)}
    some = [Point(d, loss, 0.003, n) for (n, d), loss in law.items()]
    found = estimate(some, "chinchilla_nd", 1e10, size=1e9, resamples=20)
    assert found.target == pytest.approx(1.5 + 400 * 1e9**-0.34 + 410 * 1e10**-0.28, abs=1e-9)
    with pytest.raises(UnderdeterminedFit, match="expected 3 model sizes and 3 numbers of tokens, got 2 and 4"):
        estimate([p for p in some if p.size > 1e7], "chinchilla_nd", 1e10, size=1e9)
    with pytest.raises(ValueError, match="tokens, size: expected positive numbers"):
        estimate(some, "chinchilla_nd", 1e10)
    with pytest.raises(ValueError, match="expected one model size for 'chinchilla'"):
        estimate(some)
    with pytest.raises(ValueError, match="expected a model size of every point"):
        estimate(points(), "chinchilla_nd", 1e10, size=1e9)


@pytest.mark.filterwarnings("ignore:points of 'a' scatter")
def test_a_domain_that_has_nothing_to_learn_is_flagged_and_not_refused():
    found = estimate(points(lambda d: 2.5 + 0 * d, seed=2))
    assert "degenerate" in found.flags
    assert found.target == pytest.approx(2.5, abs=0.01)


def test_far_and_noisy_points_are_said():
    with pytest.warns(UserWarning, match="points of 'a': tokens are 8.2 times the largest size"):
        assert "reaching" in estimate(points(sizes=SIZES / 2.05, se=1e-3)).flags
    noisy = [p._replace(se=0.0005) for p in points(seed=5)]
    with pytest.warns(UserWarning, match="points of 'a' scatter"):
        wide = estimate(noisy)
    assert "noisier than se" in wide.flags
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        narrow = estimate([p._replace(se=0.0005) for p in points()])
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_baselines():
    last = estimate(form="last_checkpoint")
    assert (last.target, last.se_target) == (points()[-1].loss, 0.003)
    assert (last.low, last.high) == pytest.approx((last.target - 0.0049346, last.target + 0.0049346), abs=1e-7)
    assert estimate(form="none").target == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l_init": {"b": (2.5, 0.1)}}, "l_init: expected the domains of points"),
        ({"l_init": {"a": (2.5, -0.1)}}, "l_init: expected a finite loss"),
        ({"form": "power"}, "form: expected one of"),
        ({"allow": {"noise"}}, "allow: expected some of"),
        ({"tokens": 0.0}, "tokens, size: expected positive numbers"),
        ({"resamples": 1}, "resamples: expected at least 2"),
        (
            {"points": {"a": [Point(1e8, 2.0, 0.0)]}},
            "points of 'a': expected positive tokens, losses and standard",
        ),
        ({"points": {"a": []}}, "points of 'a': expected positive tokens"),
        ({"points": {}}, "points: expected different names"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    right = {"points": {"a": points()}, "l_init": START, "tokens": FULL, "form": "chinchilla"}
    with pytest.raises(ValueError, match=message):
        estimate_targets(**{**right, **change})


def test_the_file_gives_back_everything(tmp_path):
    found = estimate_targets({"a": points(seed=0)}, START, FULL, "chinchilla", resamples=20, use="upper")
    given = Targets.given(("x", "y"), (2, 3), (1, 2), se_target=(0.1, 0.2), form="perfect")
    for targets in (found, given):
        targets.save(tmp_path / "targets.json")
        again = Targets.load(tmp_path / "targets.json")
        assert repr(again) == repr(targets)  # nan is not itself, its name is
    text = (tmp_path / "targets.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    for broken in ("{", '{"by_domain": {"a": 1}}', "[]"):
        (tmp_path / "targets.json").write_text(broken)
        with pytest.raises(ValueError, match=r"path: expected a file that Targets\.save wrote"):
            Targets.load(tmp_path / "targets.json")


def test_an_end_of_the_interval_can_be_passed_on():
    found = estimate_targets({"a": points(seed=0)}, START, FULL, "chinchilla")
    one = found.by_domain["a"]
    assert found.loss.tolist() == [one.target]
    assert dataclasses.replace(found, use="lower").loss.tolist() == [one.low]
    assert dataclasses.replace(found, use="upper").loss.tolist() == [one.high]
    assert len(found.proxy) == 64
    other = estimate_targets({"a": points(seed=1)}, START, FULL, "chinchilla")
    assert other.proxy != found.proxy


def test_targets_that_cannot_be():
    with pytest.raises(ValueError, match="finite losses and errors of 'a' for 'upper'"):
        Targets({"a": DomainTarget(2.0, 1.0)}, use="upper")
    with pytest.raises(ValueError, match="use: expected"):
        Targets({"a": DomainTarget(2.0, 1.0)}, use="middle")
    with pytest.raises(ValueError, match=r"target: expected \(2,\) numbers"):
        Targets.given(("a", "b"), (2, 2), (1,))
    with pytest.raises(ValueError, match="domains: expected different names"):
        Targets.given(("a", "a"), (2, 2), (1, 1))
