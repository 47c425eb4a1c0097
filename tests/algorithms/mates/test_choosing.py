"""Documents are labelled by the cheapest backend that ranks them as real updates do, or not at all."""

import numpy as np
import pytest
import torch

from algorithms.mates.models import TASK, bits, bytes_of, reference, same_bits, trained
from algorithms.mates.test_labels import files, pool, stage_in
from ghostgram.algorithms.mates.files.store import Stage
from ghostgram.algorithms.mates.labels import choosing
from ghostgram.algorithms.mates.labels.audit import AuditError
from ghostgram.algorithms.mates.labels.exact import ExactLabels
from ghostgram.algorithms.mates.labels.first_order import DotsLabels
from ghostgram.algorithms.mates.labels.label import label
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.labels.task import Task

GIVEN, REFERENCES = pool(48), [reference(24)]


def labelled(model, optimizer, **options):
    return label(model, optimizer, GIVEN, REFERENCES, TASK, **{"clip": 1.0, "audit": 24, "progress": False} | options)


@pytest.fixture
def job():
    return trained(weight_decay=0.1, lr=1e-3)


def test_the_audited_have_exact_labels_and_all_others_those_that_passed(job):
    before = bits(*job)
    labels = labelled(*job)
    assert same_bits(bits(*job), before)
    view = OptimizerView(*job, clip=1.0)
    truth = {}
    for kind in (ExactLabels, DotsLabels):
        backend = kind(job[0], view, REFERENCES, TASK)
        backend.prepare()
        truth[backend.name] = backend.influence(*bytes_of(GIVEN["text"].to_pylist())).values[:, 0].numpy()
    manifest, audited = labels.manifest, labels.table["is_audit"].to_numpy(zero_copy_only=False)
    audit = manifest["audit"]
    assert (manifest["chosen"], audit["verdict"]) == ("dots", "pass")
    assert audited.sum() == manifest["audited"] == audit["documents"]
    assert 24 <= audited.sum() < 48
    first = sorted(labels.ids)[: audited.sum()]
    assert {doc for doc, taken in zip(labels.ids, audited, strict=True) if taken} == set(first)
    assert np.allclose(labels.influence[audited, 0], truth["exact"][audited], rtol=1e-6, atol=0)
    assert np.allclose(labels.influence[~audited, 0], truth["dots"][~audited], rtol=1e-5, atol=0)
    assert abs(truth["exact"] - truth["dots"]).max() > 1e-5
    assert set(labels.table["backend"].to_numpy(zero_copy_only=False)[~audited]) == {"dots"}
    assert audit["comparisons"][0]["rho"] >= 0.95
    assert "enlarge the reference kept" in audit["advice"][0]


def test_a_run_that_was_killed_after_its_audit_does_not_audit_again(job, tmp_path, monkeypatch):
    whole = labelled(*job, chunk=4, run=tmp_path / "whole")
    commit = Stage.commit

    def until_the_second_chunk(self, unit, *given, **named):
        if unit == "000001":
            raise KeyboardInterrupt
        return commit(self, unit, *given, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stage, "commit", until_the_second_chunk)
        labelled(*job, chunk=4, run=tmp_path / "cut")
    assert stage_in(tmp_path / "cut").names() == ["000000", "audit"]
    with monkeypatch.context() as patch:
        patch.setattr(ExactLabels, "probe", lambda *_: pytest.fail("audited again"))
        resumed = labelled(*job, chunk=4, run=tmp_path / "cut")
    assert resumed.table.equals(whole.table)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_what_does_not_pass_labels_nothing(job, tmp_path):
    """Unless a lower bar is asked for, which is written down."""
    with pytest.raises(AuditError, match=r"no backend reaches a rank correlation of 0\.95"):
        labelled(*job, backend="jvp", run=tmp_path)
    assert files(tmp_path) == {}
    labels = labelled(*job, backend="jvp", accept_rho=0.0, run=tmp_path)
    assert labels.manifest["chosen"] == "jvp"
    assert labels.manifest["audit"]["accept_rho"] == 0.0
    assert labels.manifest["audit"]["comparisons"][0]["rho"] < 0.95


def test_a_failed_audit_goes_on_to_what_is_more_exact(job):
    labels = labelled(*job, accept_rho=0.995)
    assert labels.manifest["chosen"] == "adam"
    assert labels.manifest["audit"]["verdict"] == "upgrade"
    assert [c["backend"] for c in labels.manifest["audit"]["comparisons"]] == ["dots", "adam"]
    labels = labelled(*job, accept_rho=1.0)
    assert labels.manifest["chosen"] == "exact"
    assert set(labels.table["backend"].to_pylist()) == {"exact"}


def test_many_documents_are_not_labelled_exactly_unasked(job, monkeypatch):
    monkeypatch.setattr(choosing, "AFFORDABLE", 47)
    with pytest.raises(AuditError):
        labelled(*job, accept_rho=1.0)
    with pytest.raises(ValueError, match=r"'exact', or at most 47 documents .* got 'auto' and 48; dots: .*Adagrad"):
        labelled(*trained(torch.optim.Adagrad))


def test_without_a_closed_form_labels_are_exact(job):
    labels = labelled(*trained(torch.optim.Adagrad))
    assert labels.manifest["chosen"] == "exact"
    with pytest.raises(ValueError, match=r"backend: 'adam' cannot run here: .*Adagrad has no closed form"):
        labelled(*trained(torch.optim.Adagrad), backend="adam")


def test_exact_labels_tell_what_the_reference_is_worth(job):
    """And how well what was said before still holds."""
    exact = labelled(*job, backend="exact", audit=0)
    said = dict(zip(GIVEN["text"].to_pylist(), -exact.influence, strict=True))
    labels = labelled(*job, backend="exact", previous=lambda texts: [said[text] for text in texts])
    (worth,) = labels.manifest["audit"]["worth"]
    assert 0 < worth["reliability"] < 0.95
    assert worth["drift"] == -1.0
    assert labels.table.drop_columns("is_audit").equals(exact.table.drop_columns("is_audit"))
    assert exact.manifest["audit"] is None


def test_labels_that_drown_in_rounding_are_noticed():
    def rounded(model, ids):
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids)

    model, optimizer = trained(weight_decay=0.1, lr=1e-5, dtype=torch.float32)
    found = [
        label(
            model, optimizer, GIVEN, REFERENCES, task, backend="exact", clip=1.0, audit=24, wider=TASK, progress=False
        )
        for task in (TASK, Task(bytes_of, rounded))
    ]
    same, coarse = (labels.manifest["audit"] for labels in found)
    assert same["worth"][0]["numeric"] == 1.0
    assert coarse["worth"][0]["numeric"] < 0.97
    assert any("the exact labels on kept are noisy" in advice for advice in coarse["advice"])


def test_too_few_documents_cannot_be_audited(job):
    with pytest.raises(ValueError, match="audit: expected at least 16 documents, got 9"):
        labelled(*job, audit=9)


def test_numbers_that_are_none_are_null_in_the_manifest(job):
    labels = label(*job, GIVEN, [reference(1)], TASK, backend="exact", clip=1.0, audit=24, progress=False)
    assert labels.manifest["audit"]["worth"][0]["halves"] is None
