"""`ghostgram mates status`: how far a run is, from its files alone; what it cannot read it names."""

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from algorithms.mates.training import STEPS, train, write_pool
from ghostgram.algorithms.mates.stats import spearman
from ghostgram.cli.app import app


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_pool(folder / "pool")
    return folder, train(folder, STEPS)[0]


def told(*arguments):
    return CliRunner().invoke(app, ["mates", "status", *map(str, arguments)])


def test_stages_are_told_from_their_files(run):
    folder, loop = run
    found = json.loads(told(folder / "run", "--json").output)
    assert [each["stage"] for each in found] == [0, 1, 2]
    assert found[0]["state"] == {"label": "absent", "fit": "absent", "score": "absent", "select": "complete"}
    assert set(found[2]["state"].values()) == {"complete"}
    assert found[2]["select"]["report"]["documents"] == len(loop.selection.plan)
    assert found[2]["drift"]["kept"] == pytest.approx(loop.selection.drift["kept"], abs=1e-9)
    # What the model says of the labelled documents, put back into nats, ranks as its scores do.
    labels = loop.selection.labels
    by_id = dict(
        zip(loop.pool.sample(10**6)["doc_id"].to_pylist(), loop.pool.sample(10**6)["text"].to_pylist(), strict=True)
    )
    said = loop.scorer.influence([by_id[i] for i in labels.ids])[:, 0]
    assert found[2]["agreement"]["kept"] == pytest.approx(spearman(said, labels.influence[:, 0]), abs=1e-6)


def test_tables_and_figures(run, tmp_path):
    folder, _ = run
    shown = told(folder / "run", "--out", tmp_path)
    assert shown.exit_code == 0, shown.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"predicted-1-kept.png", "predicted-2-kept.png", "domains.png", "drift.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.iterdir())
    assert "exact" in shown.output


def test_an_unfinished_stage_is_open(run, tmp_path):
    import shutil

    folder, _ = run
    shutil.copytree(folder / "run", tmp_path / "run")
    for path in (tmp_path / "run/stage-2").glob("select/*"):
        shutil.rmtree(path)
    (found,) = [each for each in json.loads(told(tmp_path / "run", "--json").output) if each["stage"] == 2]
    assert found["state"]["select"] == "absent"
    assert found["state"]["score"] == "complete"


def test_a_folder_without_stages_is_refused(tmp_path):
    shown = told(tmp_path)
    assert shown.exit_code == 2
    assert "stage-<number>" in shown.output


def test_a_damaged_manifest_is_named(run, tmp_path):
    import shutil

    folder, _ = run
    shutil.copytree(folder / "run", tmp_path / "run")
    path = next((tmp_path / "run/stage-1/label").glob("*/manifest.json"))
    path.write_text(path.read_text().replace("exact", "wrong", 1))
    shown = told(tmp_path / "run")
    assert shown.exit_code == 2
    assert str(path) in shown.output.replace("\n", "")
