"""`ghostgram pad`: a run from a file of settings, its report, and what is wrong with either in one line."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

import yaml

from algorithms.pad.pictures import NAMES, SETTINGS, pictures
from ghostgram import data
from ghostgram.algorithms.pad import DistilledSet
from ghostgram.cli.app import app
from ghostgram.data.images import Images
from ghostgram.report import pad as page


@pytest.fixture(scope="module", autouse=True)
def set_of_pictures():
    """An image set of our own under the name of one that has to be downloaded."""
    (train, labels), (test, test_labels) = pictures(), pictures(60, 1)
    found = Images(train.numpy(), labels.numpy(), test.numpy(), test_labels.numpy(), NAMES)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data, "load_images", lambda name, root=None: found)
        yield


def told(*arguments):
    return CliRunner().invoke(app, ["pad", *map(str, arguments)])


def job(folder, **changes):
    written = {"run": str(folder / "run"), "preset": "digits-1", "data": {"name": "digits"},
               "settings": SETTINGS.as_json(), **changes}  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(written))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pad")
    outputs = {name: told(name, job(folder), "--quiet") for name in ("score", "experts", "distill", "evaluate", "run")}
    assert [each.exit_code for each in outputs.values()] == [0] * 5, [each.output for each in outputs.values()]
    return folder, {name: each.output for name, each in outputs.items()}


def test_parts_are_told_one_by_one(finished):
    _, said = finished
    assert "96 images, el2n: " in said["score"]
    assert "2 experts, epochs 0, 1, 2, 3, 4" in said["experts"]
    assert "6 iterations, 0 of 6 matches left out" in said["distill"]
    assert set(json.loads(said["evaluate"])) == {"test", "validation", "iteration"}
    assert "distilled" in said["run"]
    assert "report.html" in said["run"]


def test_the_report_is_written_and_stands_alone(finished, tmp_path):
    folder, _ = finished
    names = {"grid.png", "initial.png", "difference.png", "curves.parquet", "curves.png", "report.html"}
    assert names <= {path.name for path in (folder / "run").iterdir()}
    done = told("report", folder / "run", "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["iterations"] == found["matches"] == found["kept"] == 6
    made = DistilledSet.load(folder / "run" / "distilled.npz")
    assert found["accuracies"] == made.results["test"]
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.glob("*.png"))
    text = (tmp_path / "report.html").read_text()
    links = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            links.extend(value for name, value in attributes if name in ("src", "href") and tag != "use")

    Links().feed(text)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "selected on test" not in text
    for name in made.results["test"]:
        assert name.replace("'", "&#x27;") in text


def test_curves_are_a_table(finished, monkeypatch, tmp_path):
    import pyarrow.parquet as pq

    folder, _ = finished
    table = pq.read_table(folder / "run" / "curves.parquet")
    assert table.num_rows == 6
    assert np.isfinite(table["validation"].to_numpy()).tolist() == [False, False, True, False, False, True]
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    page.write(folder / "run", tmp_path)
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert lines[0].split(",") == table.column_names
    assert float(lines[3].split(",")[1]) == pytest.approx(table["loss"][2].as_py())


def test_what_the_published_code_does_is_said(finished, tmp_path):
    folder, _ = finished
    for name in ("log.jsonl", "distilled.npz", "initial.npz", "evaluation.npz"):
        (tmp_path / name).write_bytes((folder / "run" / name).read_bytes())
    facts = json.loads((folder / "run" / "run.json").read_text())
    facts["settings"]["protocol"] = "release"
    facts["notes"]["initial"] = ["no expert is right on <4> images"]
    (tmp_path / "run.json").write_text(json.dumps(facts))
    done = told("report", tmp_path)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "report.html").read_text()
    assert "selected on test" in text
    assert "no expert is right on &lt;4&gt; images" in text
    assert "<4>" in done.output


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"settings": {"lr_image": 1}}, "lr_image: no such setting; did you mean lr_images?"),
        ({"preset": "digits-11"}, "preset: expected one of"),
        ({"setting": {}}, "no such key: setting; expected some of run, preset, data"),
        ({"data": {"name": "digits", "split": 1}}, "data: no such key: split"),
        ({"data": {}}, "data: name is missing"),
        ({"data": None}, "data: expected names and values, got None"),
        ({"data": {"name": "digits", "samples": 10**6}}, "samples: expected 1 to"),
        ({"settings": {**SETTINGS.as_json(), "alpha": 0.5}}, "alpha: 0.25 before, 0.5 now"),
    ],
)
def test_what_is_wrong_is_one_line(finished, changes, match, tmp_path):
    folder, _ = finished
    done = told("distill", job(tmp_path, **{"run": str(folder / "run"), **changes}), "--quiet")
    assert done.exit_code == 2
    assert match in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_what_is_no_run_is_refused(tmp_path):
    done = told("report", tmp_path)
    assert done.exit_code == 2
    assert "expected the folder of a finished run of PAD, without run.json, log.jsonl, distilled.npz" in done.output
    done = told("run", tmp_path / "absent.yaml")
    assert done.exit_code == 2
    assert "absent.yaml: cannot be read" in done.output


def test_a_part_of_the_data_is_taken_by_class(tmp_path):
    from ghostgram.cli.pad import Job

    run = Job.read(job(tmp_path, data={"name": "digits", "samples": 60})).begin(progress=False)
    assert np.bincount(run.ground.labels.numpy()).tolist() == [16, 16, 16]
