"""The learning curve's law against planted ones, the rule that stops, and a curve of real fits."""

import numpy as np
import pytest

from algorithms.mates.planted import documents, influences
from ghostgram.algorithms.mates.influence import curve as module
from ghostgram.algorithms.mates.influence.curve import LEAST, Curve, Gain, Point, intensity, judged, learning_curve
from ghostgram.algorithms.mates.influence.law import Law, fit_law, gains
from ghostgram.algorithms.mates.influence.model import fit
from ghostgram.algorithms.mates.influence.ngram import EmbeddingRidge, HashedNgramRidge

PLANTED = [Law(0.7, 3.0, 0.5), Law(0.5, 2.0, 0.4), Law(0.85, 8.0, 0.7)]


def observed(law, most, noise, seed):
    """Sizes and Spearmans as `learning_curve` finds them: three subsets of all sizes but the last."""
    n = np.array([most / 16, most / 8, most / 4, most / 2] * 3 + [most])
    return n, np.array([law.at(size) for size in n]) + noise * np.random.default_rng(seed).normal(size=13)


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_law_is_recovered(planted):
    assert fit_law(*observed(planted, 16000, 0.0, 0)) == pytest.approx(planted, rel=1e-5)
    for seed in range(10):
        assert fit_law(*observed(planted, 16000, 0.002, seed)).limit == pytest.approx(planted.limit, abs=0.02)


def test_the_law_stays_within_its_bounds():
    n = np.array([100.0, 200.0, 400.0, 800.0])
    log = fit_law(n, 0.3 + 0.1 * np.log2(n / 100))  # steeper than any limit below 1 allows
    assert log.limit == 1
    assert log.power >= 0.1
    falling = fit_law(n, [0.5, 0.49, 0.48, 0.47])
    assert falling.scale == 0
    assert falling.limit == pytest.approx(0.485)
    assert (falling.gain(800), falling.enough(0.01)) == (0, 0)
    sudden = fit_law(n, 0.6 - 1e5 * n**-2.5)
    assert sudden.power == pytest.approx(1.5)
    with pytest.raises(ValueError, match="at least three sizes"):
        fit_law([100, 100, 200], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="spearmans: expected finite"):
        fit_law([100, 200, 400], [0.1, np.nan, 0.3])


def test_gains_of_many_are_those_of_each():
    rows = [observed(planted, 16000, 0.003, seed) for planted in PLANTED for seed in range(3)]
    n = rows[0][0]
    found = gains(n, np.stack([rho for _, rho in rows]), 16000)
    assert found == pytest.approx([fit_law(n, rho).gain(16000) for _, rho in rows], rel=0.02)


def test_the_law_is_no_worse_than_any_of_a_fine_grid():
    n, rho = observed(PLANTED[0], 16000, 0.01, 3)
    found = fit_law(n, rho)
    ours = sum((found.at(size) - value) ** 2 for size, value in zip(n, rho, strict=True))
    for power in np.linspace(0.1, 1.5, 57):
        x = np.stack([np.ones(13), -(n**-power)], 1)
        (limit, scale), *_ = np.linalg.lstsq(x, rho, rcond=None)
        if limit <= 1 and scale >= 0:
            assert ours <= ((x @ [limit, scale] - rho) ** 2).sum() + 1e-12


def fits(law, most, held_out, seed):
    """What `judged` takes: fits that rank held-out documents as a law says, their errors mostly the same."""
    g = np.random.default_rng(seed)
    sizes = [size for size in (most // 16, most // 8, most // 4, most // 2) for _ in range(3)] + [most]
    truth, common = g.normal(size=(2, held_out))
    predictions = []
    for size in sizes:
        pearson = 2 * np.sin(np.pi * law.at(size) / 6)  # of normal values with that Spearman
        error = np.sqrt(0.85) * common + np.sqrt(0.15) * g.normal(size=held_out)
        predictions.append(pearson * truth + np.sqrt(1 - pearson**2) * error)
    return sizes, np.stack(predictions, 1)[:, :, None], truth[:, None]


def judge(law, most, held_out, seed, worth=0.01):
    points, found, gain = judged(*fits(law, most, held_out, seed))
    return Curve(points, found, gain, (1e-3,), worth)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(("planted", "most", "held_out"), [(PLANTED[0], 2000, 150), (Law(0.9, 2.0, 0.3), 1000, 80)])
def test_the_interval_of_a_gain_covers_the_gain(planted, most, held_out):
    covers, widths = [], []
    for seed in range(20):
        curve = judge(planted, most, held_out, seed)
        covers.append(curve.gain.low <= planted.gain(most) <= curve.gain.high)
        widths.append((curve.gain.high - curve.gain.low) / (curve.points[-1].high - curve.points[-1].low))
    assert np.mean(covers) >= 0.9
    assert np.mean(widths) < 0.5  # all fits see the same held-out documents


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("planted", "most", "held_out", "verdict"),
    [
        (Law(0.9, 2.0, 0.3), 2000, 600, "more"),  # a doubling gains .038
        (Law(0.6, 8.0, 1.0), 8000, 600, "enough"),  # .0005
        (PLANTED[0], 8000, 300, "open"),  # .0098, of which .01 is to be told
        (Law(0.9, 2.0, 0.3), 1000, 40, "open"),  # .047, and 40 documents to tell it by
        (Law(0.6, 8.0, 1.0), 1000, 2000, "open"),  # a law through fits of 62 labels and fewer
    ],
)
def test_the_verdict_is_what_the_whole_interval_says(planted, most, held_out, verdict):
    found = [judge(planted, most, held_out, seed).verdict for seed in range(5)]
    assert found.count(verdict) >= 4
    assert ("enough" if planted.gain(most) > 0.01 else "more") not in found


def test_enough_is_of_the_law_and_never_below_the_least():
    def curve(law, worth=0.01):
        return Curve((), law, Gain(law.gain(2000), 0, 1), (1e-3,), worth)

    for planted in PLANTED:
        assert planted.gain(planted.enough(0.01)) == pytest.approx(0.01)
        assert curve(planted).enough == max(LEAST, int(np.ceil(planted.enough(0.01))))
    assert curve(PLANTED[0], 0.02).enough < curve(PLANTED[0]).enough
    assert curve(PLANTED[0], 0.3).enough == LEAST  # by the law 8 labels


def test_a_gain_is_worth_what_it_does_to_a_selection():
    assert intensity(0.2) == pytest.approx(1.39981, abs=1e-5)
    generator = np.random.default_rng(0)
    truth = generator.normal(size=400_000)
    for rho in (0.3, 0.6):
        score = rho * truth + np.sqrt(1 - rho**2) * generator.normal(size=len(truth))
        assert truth[np.argsort(-score)[:80_000]].mean() == pytest.approx(rho * intensity(0.2), abs=0.01)
    law = Law(0.7, 3.0, 0.5)
    curve = Curve((Point(1000, 0.5, 0.49, 0.51, (0.5,)),), law, Gain(law.gain(1000), 0, 1), (2e-3, 4e-3), 0.01)
    gained = curve.law.at(2000) - curve.law.at(1000)
    assert curve.value(1e9) == pytest.approx(gained * 1.39981 * 3e-3 / (1000 * 1e9), rel=1e-4, abs=0)
    with pytest.raises(ValueError, match="flops_per_label: expected a positive"):
        curve.value(0.0)
    with pytest.raises(ValueError, match="share: expected"):
        intensity(1.0)


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(module, "RESAMPLES", 100)


@pytest.mark.usefixtures("few_resamples")
def test_a_curve_of_real_fits_rises_and_ends_at_the_fit_of_all_labels():
    texts, ids = documents(1600, 70)
    labels = np.hstack([influences(texts, 70, noise=0.5), influences(texts, 71, noise=0.5)])
    labels[::3, 1] = np.nan
    ridge, calls = HashedNgramRidge(bits=12), []
    curve = learning_curve(
        texts, labels, ids, ["one", "two"], encoder=ridge, progress=lambda done, total: calls.append((done, total))
    )
    whole = fit(texts, labels, ids, ["one", "two"], encoder=ridge)
    n = len(texts) - whole.report.heads[0].measured_on
    assert [point.labels for point in curve.points] == [n // 16, n // 8, n // 4, n // 2, n]
    assert [len(point.subsets) for point in curve.points] == [3, 3, 3, 3, 1]
    assert calls == [(done, 13) for done in range(1, 14)]
    assert curve.points[-1].spearman == pytest.approx(whole.report.spearman, abs=1e-6)
    assert np.all(np.diff([point.spearman for point in curve.points]) > 0)
    for point in curve.points:
        assert point.low < point.spearman < point.high
        assert point.spearman == pytest.approx(np.mean(point.subsets))
    assert len({*curve.points[0].subsets}) == 3
    assert curve.std == tuple(whole.std)
    assert curve.gain.low < curve.gain.value < curve.gain.high


@pytest.mark.usefixtures("few_resamples")
def test_a_trained_encoder_is_stood_in_for_by_a_ridge_on_its_embedding():
    class Counting:
        def embed(self, texts):
            return np.array([[text.count(letter) for letter in "abdefgiklmnorstu"] for text in texts], np.float32)

    texts, ids = documents(700, 72)
    labels = influences(texts, 72)
    stood_in = learning_curve(texts, labels, ids, ["r"], encoder=Counting())
    assert stood_in == learning_curve(texts, labels, ids, ["r"], encoder=EmbeddingRidge(embed=Counting().embed))
    with pytest.raises(ValueError, match="labels: expected at least 512 to learn of each reference, got"):
        learning_curve(texts[:500], labels[:500], ids[:500], ["r"])
    with pytest.raises(ValueError, match="subsets: expected at least 1, got 0"):
        learning_curve(texts, labels, ids, ["r"], subsets=0)
    with pytest.raises(ValueError, match="worth: expected a positive gain, got 0"):
        learning_curve(texts, labels, ids, ["r"], worth=0)
