"""An audit passes, goes on from or refuses backends by their rank correlation, and says what exact labels are worth."""

import json
import math

import pytest
import torch

from algorithms.mates.models import TASK, bytes_of, documents, reference, trained
from ghostgram.algorithms.mates.labels.audit import AuditError, audit
from ghostgram.algorithms.mates.labels.backend import Influence
from ghostgram.algorithms.mates.labels.exact import ExactLabels
from ghostgram.algorithms.mates.labels.first_order import AdamLabels, DotsLabels
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.labels.reference import Reference

N = 1024
IDS = torch.arange(N)[:, None]
"""Documents of one token, their number."""
MASK = torch.ones(N, 1, dtype=torch.bool)


class Planted:
    """Labels as if from a model: normal, and with the exact ones correlated as planted, in rank."""

    def __init__(self, name, rho, seed=0, examples=64, noise=0.1, scale=1.0):
        random = torch.Generator().manual_seed(1000)
        of_halves, exact = (torch.randn(N, k, generator=random, dtype=torch.float64) for k in (examples, 1))
        self.examples = exact / examples + noise / examples**0.5 * of_halves
        exact = self.examples.sum(1, keepdim=True)
        linear = 2 * math.sin(math.pi / 6 * rho)  # of two normals
        mine = torch.randn(N, 1, generator=random.manual_seed(2000 + seed), dtype=torch.float64)
        mixed = linear * exact / exact.std() + math.sqrt(1 - linear**2) * mine
        self.values = exact if name == "exact" else mixed / scale
        self.name, self.null_gain = name, torch.tensor([0.25], dtype=torch.float64)
        self.references = [Reference("kept", *bytes_of(["ab"] * examples))]
        self.seen = []

    def influence(self, ids, mask):
        self.seen += ids[:, 0].tolist()
        clip = 1.0 - 0.5 * (ids[:, 0] % 2).double()
        return Influence(self.values[ids[:, 0]], clip, clip, clip)

    def probe(self, ids, mask):
        return self.influence(ids, mask), [self.examples[ids[:, 0]]]


def planted(*rhos, names=("jvp", "dots", "adam"), **settings):
    exact = Planted("exact", 1.0)
    ladder = [Planted(name, rho, seed) for seed, (name, rho) in enumerate(zip(names, rhos, strict=False))]
    return audit(IDS, MASK, exact, iter(ladder), **settings), exact, ladder


def test_a_good_backend_passes_with_the_first_documents():
    found, exact, (jvp, dots) = planted(0.99, 0.99)
    assert (found.verdict, found.backend, found.documents) == ("pass", "jvp", 256)
    assert exact.seen == jvp.seen == list(range(256))
    assert dots.seen == []
    row = found.comparisons[0]
    assert row.rho == found.rho
    assert 0.98 < row.low < row.rho < row.high < 1
    assert abs(row.low - row.fisher_low) < 0.005
    assert abs(row.high - row.fisher_high) < 0.005
    assert row.pearson > 0.98
    assert row.overlap > 0.85
    assert found.clipped == 0.5
    assert found.advice == ["50% of the documents are clipped, which jvp does not see: prefer dots"]
    assert json.loads(json.dumps(found.manifest()))["comparisons"][0]["rho"] == row.rho


def test_a_bad_backend_is_followed_by_the_next():
    found, exact, (*_, adam) = planted(0.9, 0.99, 0.99)
    assert (found.verdict, found.backend) == ("upgrade", "dots")
    assert [c.backend for c in found.comparisons] == ["jvp", "dots"]
    assert adam.seen == []
    assert len(exact.seen) == found.documents  # labelled once, for all backends
    assert found.rho > 0.97


def test_when_none_will_do_the_table_is_in_the_error():
    with pytest.raises(AuditError, match=r"no backend reaches a rank correlation of 0\.95") as raised:
        planted(0.5, 0.5)
    assert raised.value.audit.verdict == "refuse"
    assert "enlarge the reference, or lower the bar" in str(raised.value)
    for row in raised.value.audit.comparisons:
        assert row.rho < 0.6
        assert f"{row.rho:.3f}" in str(raised.value)


def test_an_open_verdict_takes_more_documents():
    found, exact, (jvp,) = planted(0.953, begin=32)
    assert found.backend == "jvp"
    assert found.documents in (64, 128, 256, 512, 1024)
    assert exact.seen == jvp.seen == list(range(found.documents))


def test_open_to_the_end_is_no_pass():
    with pytest.raises(AuditError) as raised:
        planted(0.945, begin=16, most=64)
    assert raised.value.audit.documents == 64
    assert raised.value.audit.comparisons[0].high > 0.95


def test_the_bar_is_lowered_by_name_alone():
    found, *_ = planted(0.9, accept_rho=0.85)
    assert (found.verdict, found.bar, found.manifest()["accept_rho"]) == ("pass", 0.85, 0.85)


def test_exact_labels_at_the_end_of_the_ladder_will_always_do():
    exact = Planted("exact", 1.0)
    found = audit(IDS, MASK, exact, [Planted("dots", 0.5), exact])
    assert (found.verdict, found.backend, len(found.comparisons)) == ("upgrade", "exact", 1)


def test_a_small_reference_is_named():
    """Halves whose labels have noise of variance s^2 each, beside a signal of 1, correlate by 1 / (1 + s^2)."""
    exact = Planted("exact", 1.0, noise=0.7)
    found = audit(IDS, MASK, exact, [exact], begin=1024)
    worth = found.worth[0]
    assert abs(worth.halves - 1 / (1 + 2 * 0.7**2)) < 0.06
    assert worth.reliability == pytest.approx(2 * worth.halves / (1 + worth.halves))
    assert found.advice[0].startswith("enlarge the reference kept")
    assert worth.null_gain == 0.25
    assert worth.sd == pytest.approx(float(exact.values.std(correction=0)))


def test_noisy_arithmetic_and_an_old_influence_model_are_told():
    exact, noisy = Planted("exact", 1.0), Planted("wider", 0.9)
    found = audit(IDS, MASK, exact, [exact], wider=noisy, previous=lambda n: -(exact.values[:n] ** 3))
    assert found.worth[0].drift == pytest.approx(-1)
    assert 0.8 < found.worth[0].numeric < 0.96
    assert noisy.seen == list(range(64))
    assert found.advice[0].startswith("the exact labels on kept are noisy")
    with pytest.raises(ValueError, match=r"previous: expected scores of shape \(256, 1\), got \(256,\)"):
        audit(IDS, MASK, exact, [exact], previous=lambda n: torch.zeros(n))


def test_slope_is_that_of_the_exact_labels():
    exact = Planted("exact", 1.0)
    found = audit(IDS, MASK, exact, [Planted("dots", 0.999, scale=float(4 / exact.values.std()))])
    assert found.comparisons[0].slope == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"begin": 15}, "expected at least 16 documents, got 15"),
        ({"begin": 64, "most": 32}, r"most: expected at least begin \(64\), got 32"),
        ({"accept_rho": 2.0}, "accept_rho: expected a correlation, got 2.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        planted(0.9, **settings)


def test_an_audit_of_a_model_labels_by_dots():
    """After some training; adam stands above as a second opinion."""
    model, optimizer = trained(dtype=torch.float32, steps=60)
    view = OptimizerView(model, optimizer, clip=1.0)
    references = [reference(24), reference(2, 3, "few")]
    exact, *ladder = (kind(model, view, references, TASK) for kind in (ExactLabels, DotsLabels, AdamLabels))
    for backend in (exact, *ladder):
        backend.prepare()
    found = audit(*bytes_of(documents(64, 5)), exact, ladder, begin=48)
    assert found.backend == "dots"
    assert len(found.comparisons) == 2
    assert any(line.startswith("enlarge the reference few") for line in found.advice)
