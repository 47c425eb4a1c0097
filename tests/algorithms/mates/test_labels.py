"""The label stage: every document once, wherever it was interrupted, and never of another model or other documents."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from algorithms.mates.models import TASK, bits, bytes_of, documents, reference, same_bits, trained
from ghostgram.algorithms.mates.files.identity import doc_id
from ghostgram.algorithms.mates.files.store import Stage, StoreError
from ghostgram.algorithms.mates.labels.exact import ExactLabels
from ghostgram.algorithms.mates.labels.label import label
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.labels.task import Task

REFERENCES = [reference(6), reference(3, 2, "other")]


def pool(count=20, seed=30):
    texts = documents(count, seed)
    return pa.table({"doc_id": pa.array([doc_id(text) for text in texts], pa.binary(16)), "text": texts})


def exact_labels(model, optimizer, documents_, **options):
    options = {"audit": 0, "clip": 1.0, "backend": "exact", "progress": False} | options
    return label(model, optimizer, documents_, REFERENCES, TASK, **options)


def test_exact_labels_of_all_documents():
    model, optimizer = trained(weight_decay=0.1)
    before, given = bits(model, optimizer), pool()
    labels = exact_labels(model, optimizer, given, chunk=8)
    assert same_bits(bits(model, optimizer), before)
    backend = ExactLabels(model, OptimizerView(model, optimizer, clip=1.0), REFERENCES, TASK)
    backend.prepare()
    truth = backend.influence(*bytes_of(given["text"].to_pylist()))
    table = labels.table
    assert labels.references == ["kept", "other"]
    assert labels.ids == given["doc_id"].to_pylist()
    assert np.array_equal(labels.influence, truth.values.numpy().astype(np.float32))
    for name, values in (("grad_norm", truth.norms), ("clip", truth.clip), ("own_loss", truth.own_loss)):
        assert np.array_equal(table[name].to_numpy(), values.numpy().astype(np.float32))
    assert table["length"].to_pylist() == [len(text) for text in given["text"].to_pylist()]
    assert set(table["start"].to_pylist()) == {0}
    assert set(table["backend"].to_pylist()) == {"exact"}
    manifest = labels.manifest
    assert manifest["sign"] == "influence, higher is better"
    assert manifest["unit"] == "nats per reference token"
    assert manifest["base_loss"] == {r.name: r.loss(model, TASK) for r in REFERENCES}
    assert manifest["null_gain"]["kept"] == pytest.approx(backend.null_gain[0].item(), abs=1e-14)
    assert manifest["flops"] == {"exact": sum(backend.flops(len(text)) for text in given["text"].to_pylist())}


def stage_in(folder):
    """The one label stage of a run."""
    (made,) = Path(folder, "stage-1", "label").iterdir()
    return Stage(folder, 1, "label", made.name)


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def test_what_is_committed_is_not_done_again(tmp_path, monkeypatch):
    model, optimizer = trained(weight_decay=0.1)
    whole = exact_labels(model, optimizer, pool(), chunk=4, run=tmp_path / "whole")
    probed = []
    influence = ExactLabels.influence

    def counted(self, ids, mask):
        if len(probed) == 2:
            raise KeyboardInterrupt
        probed.append(len(ids))
        return influence(self, ids, mask)

    monkeypatch.setattr(ExactLabels, "influence", counted)
    with pytest.raises(KeyboardInterrupt):
        exact_labels(model, optimizer, pool(), chunk=4, run=tmp_path / "cut")
    cut = stage_in(tmp_path / "cut")
    assert cut.names() == ["000000", "000001"]
    assert cut.read(["doc_id"])["doc_id"].to_pylist() == pool()["doc_id"].to_pylist()[:8]
    assert not cut.is_complete
    monkeypatch.setattr(
        ExactLabels, "influence", lambda self, *given: (probed.append(len(given[0])), influence(self, *given))[1]
    )
    resumed = exact_labels(model, optimizer, pool(), chunk=4, run=tmp_path / "cut")
    assert probed == [4] * 5
    assert resumed.table.equals(whole.table)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    again = exact_labels(model, optimizer, pool(), chunk=4, run=tmp_path / "cut")
    assert probed == [4] * 5
    assert again.table.equals(whole.table)
    assert again.manifest == whole.manifest


def test_a_damaged_chunk_is_done_again(tmp_path, monkeypatch):
    model, optimizer = trained(weight_decay=0.1)
    whole = exact_labels(model, optimizer, pool(), chunk=4, run=tmp_path)
    folder = Path(whole.folder)
    part = folder / "part-000002.parquet"
    part.write_bytes(part.read_bytes()[:-7])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["state"] == "complete"
    with pytest.raises(StoreError, match="expected"):  # complete, and no longer what it says
        exact_labels(model, optimizer, pool(), chunk=4, run=tmp_path)
    (folder / "manifest.json").unlink()
    assert exact_labels(model, optimizer, pool(), chunk=4, run=tmp_path).table.equals(whole.table)


@pytest.mark.parametrize("change", [
    "weights", "moment", "text", "tokens", "reference", {"clip": 0.5}, {"lrs": [1e-4]}, {"chunk": 5}, {"audit": 9},
], ids=str)  # fmt: skip
def test_labels_of_something_else_have_a_folder_of_their_own(change, tmp_path):
    model, optimizer = trained(weight_decay=0.1)
    given, references, task = pool(), list(REFERENCES), TASK
    options = {"backend": "exact", "clip": 1.0, "audit": 0, "progress": False, "run": tmp_path}
    first = label(model, optimizer, given, references, task, **options)
    assert label(*trained(weight_decay=0.1), pool(), REFERENCES, TASK, **options).folder == first.folder
    if change == "weights":
        model.norm.bias.data[3] += 1e-9
    elif change == "moment":
        optimizer.state[model.norm.bias]["exp_avg"][3] += 1e-9
    elif change == "text":
        texts = given["text"].to_pylist()
        given = given.set_column(1, "text", [[*texts[:-1], texts[-1] + "a"]])
    elif change == "tokens":
        task = Task(lambda texts: bytes_of([text[:9] for text in texts]))
    elif change == "reference":
        references[0] = reference(6, 99)
    else:
        options |= change
    kept = files(first.folder)
    other = label(model, optimizer, given, references, task, **options)
    assert other.folder != first.folder
    assert files(first.folder) == kept


def test_labels_that_are_not_to_be_kept_have_no_folder(tmp_path):
    assert exact_labels(*trained(weight_decay=0.1), pool()).folder is None


KILLED = """
import sys
sys.path[:0] = {path!r}
from algorithms.mates.test_labels import exact_labels, pool, trained

exact_labels(*trained(weight_decay=0.1), pool(), chunk=4, run=sys.argv[1])
"""


def test_killed_and_resumed_is_the_same_to_the_byte(tmp_path):
    """By SIGKILL, as soon as some chunk is there."""
    whole = exact_labels(*trained(weight_decay=0.1), pool(), chunk=4, run=tmp_path / "whole")
    cut = Stage(tmp_path / "cut", 1, "label", Path(whole.folder).name)
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(path=sys.path), str(tmp_path / "cut")])
    while not cut.names():
        assert process.poll() is None or cut.names()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    exact_labels(*trained(weight_decay=0.1), pool(), chunk=4, run=tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("audit", [0, 16], ids=["labelled", "audited"])
def test_influences_that_are_not_finite_name_their_documents(audit):
    model, optimizer = trained()
    given = pool(16)
    task = Task(bytes_of, lambda model, ids: model(ids) / (ids[:, :1, None] != ord(given["text"][2].as_py()[0])))
    with pytest.raises(ValueError, match=f"of {given['doc_id'][2].as_py().hex()}.* is not finite"):
        label(model, optimizer, given, [reference(1, 5)], task, backend="exact", audit=audit, progress=False)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(backend="fast"), "backend: expected auto, finite_difference, .* got 'fast'"),
    (dict(chunk=0), "chunk: expected at least 1"),
    (dict(references=[]), "references: expected some"),
    (dict(references=[reference(2), reference(3)]), r"each of a name of its own, got \['kept', 'kept'\]"),
    (dict(documents=pool().drop_columns("text")), "columns doc_id and text, text missing"),
    (dict(documents=pool().slice(0, 0)), "expected at least one"),
    (dict(documents=pa.concat_tables([pool(), pool(3)])), "expected each doc_id once, got 23 of 20"),
    (dict(documents=pa.table({"doc_id": [b"short"], "text": ["abc"]})), "expected a doc_id of 16 bytes, got b'short'"),
])  # fmt: skip
def test_wrong_arguments_are_refused(changes, message):
    given = {"documents": pool(), "references": REFERENCES, "task": TASK} | changes
    with pytest.raises(ValueError, match=message):
        label(*trained(), **given)
