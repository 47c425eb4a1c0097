"""`ghostgram velocitune`: what a log says, targets from a record of runs, toys, and replays; refusals in one line."""

import json
import re
from itertools import chain

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

from algorithms.velocitune.tiny import BATCH, SIZES, TOKENS, model_and_optimizer, sampler, train
from ghostgram.algorithms.velocitune.reading import read
from ghostgram.algorithms.velocitune.sampler import Schedule
from ghostgram.algorithms.velocitune.targets import Targets
from ghostgram.cli.app import app


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its folder with log and mixture.json, its sampler, and the ids of its batches."""
    folder = tmp_path_factory.mktemp("run")
    model, optimizer = model_and_optimizer()
    data = sampler(model, folder=folder / "log")
    ids, _ = train(model, optimizer, data)
    data.export().save(folder / "mixture.json")
    return folder, data, ids


def told(*arguments):
    return CliRunner().invoke(app, ["velocitune", *map(str, arguments)])


def test_a_log_is_read_back(run):
    folder, data, _ = run
    course = read(folder / "log")
    assert course.domains == tuple(SIZES)
    assert course.step.tolist() == [4, 8, 12, 16, 20, 24]
    assert course.tokens[-1] == TOKENS
    np.testing.assert_array_equal(course.weights[-1], data.weights)
    np.testing.assert_allclose(course.weights[0], np.array([4, 3, 2]) / 9, atol=1e-15)
    assert np.isnan(course["target_low"]).all()


def test_a_report_says_where_the_run_ended(run):
    folder, data, _ = run
    found = json.loads(told("report", folder / "log", "--json").output)
    assert (found["updates"], found["steps"], found["tokens"]) == (6, 24, TOKENS)
    assert [one["w_after"] for one in found["domains"].values()] == data.weights.tolist()
    assert [one["w_mean"] for one in found["domains"].values()] == pytest.approx(data.export().mean.tolist(), abs=1e-15)
    epochs = [one["epochs"] for one in found["domains"].values()]
    assert epochs == (data.controller.counts.draws / list(SIZES.values())).tolist()
    assert found["domains"]["prose"]["target"] == 2.3


def test_tables_and_figures(run, tmp_path):
    folder, _, _ = run
    shown = told("report", folder / "log", "--out", tmp_path, "--figures", "png")
    assert shown.exit_code == 0, shown.output
    figures = {"weights", "velocities", "losses", "epochs", "realised"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in figures} | {"report.html"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.glob("*.png"))
    assert "velocitune-paper" in shown.output
    assert "6 updates" in shown.output


def test_the_page_stands_alone_and_says_what_the_command_says(run, tmp_path):
    folder, _, _ = run
    shown = told("report", folder / "log", "--out", tmp_path, "--json")
    found, page = json.loads(shown.stdout), (tmp_path / "report.html").read_text("utf-8")
    assert page.count("<svg") == page.count("</svg>") == 5
    assert not re.search(r"<script|<link|src=['\"]http", page)
    for name, one in found["domains"].items():
        row = re.search(rf"</span>{name}</th>(.*?)</tr>", page).group(1)
        assert re.findall(r"<td>(.*?)</td>", row)[:4] == [
            f"{one[column]:.3f}" for column in ("w_before", "w_after", "w_mean", "loss")
        ]
    assert f"<strong>{found['updates']}</strong> times" in page
    assert found["rule"].splitlines()[0] in page


def test_what_is_no_log_is_named(run, tmp_path):
    assert told("report", tmp_path).exit_code == 2
    (tmp_path / "part-0000000001-0000000002.parquet").write_bytes(b"torn")
    shown = told("report", tmp_path)
    assert shown.exit_code == 2
    assert "part-0000000001-0000000002.parquet" in shown.output.replace("\n", "")


def test_a_replay_trains_on_the_same_samples(run, tmp_path):
    folder, _, ids = run
    shown = told("replay", folder / "mixture.json", "reversed", "--out", tmp_path / "reversed.json")
    assert shown.exit_code == 0, shown.output
    written = json.loads((tmp_path / "reversed.json").read_text())
    schedule = Schedule(SIZES, np.ones(3), BATCH)
    schedule.load_state_dict(written["schedule"])
    again = []
    for _ in range(written["batches"]):
        slots = schedule.advance()
        again.append(list(zip(slots.domains.tolist(), schedule.samples(slots).tolist(), strict=True)))
    assert again != ids
    assert sorted(chain.from_iterable(again)) == sorted(chain.from_iterable(ids))
    shown = told("replay", folder / "mixture.json", "sideways", "--out", tmp_path / "no.json")
    assert shown.exit_code == 2
    assert "kind: expected" in shown.output
    assert not (tmp_path / "no.json").exists()


def test_toys_say_which_interval_is_safe():
    shown = told("simulate", "--tau", "1,3", "--total", "6", "--interval", ".1,.5", "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    assert [(each["preset"], each["interval"]) for each in found] == [
        ("paper", 0.1), ("paper", 0.5), ("robust", 0.1), ("robust", 0.5),
    ]  # fmt: skip
    paper, robust = ([each["weights"][1] for each in found if each["preset"] == name] for name in ("paper", "robust"))
    assert abs(robust[0] - robust[1]) < 0.1 * abs(paper[0] - paper[1])  # eta is for tokens there, not for an update
    assert found[0]["equal_velocity"] == [0.25, 0.75]
    shown = told("simulate", "--tau", "1,3", "--total", "6", "--interval", "often")
    assert shown.exit_code == 2
    assert "--interval: expected numbers" in shown.output
    assert "0.7500" in told("simulate", "--tau", "1,3", "--total", "6", "--interval", ".5").output


def test_targets_come_of_a_record_of_runs(tmp_path):
    def law(n):
        return 1.3 + 60 * n**-0.25

    sizes = np.geomspace(1e9 / 64, 1e9 / 4, 6).round().astype(int).tolist()
    record = {str(n): {"a": [law(n), 1e-3], "b": [1 + law(n), 1e-3]} for n in sizes}
    record["0"] = {"a": [4.0, 0.001], "b": [5.0, 0.001]}
    (tmp_path / "runs.json").write_text(json.dumps(record))
    out = tmp_path / "targets.json"
    given = ("fit", tmp_path / "runs.json", "--tokens", 1e9, "--out", out, "--form", "chinchilla")
    shown = told(*given, "--figure", tmp_path / "fits.svg")
    assert shown.exit_code == 0, shown.output
    made = Targets.load(out)
    np.testing.assert_allclose(made.loss, [law(1e9), 1 + law(1e9)], atol=1e-6)
    assert made.l_init.tolist() == [4.0, 5.0]
    assert (tmp_path / "fits.svg").read_text().startswith("<?xml")
    out.unlink()
    shown = told("fit", tmp_path / "runs.json", "--tokens", 1e10, "--out", out, "--form", "chinchilla")
    assert shown.exit_code == 2  # 40 times the largest run
    assert "allow={'far'}" in shown.output.replace("\n", "")
    assert not out.exists()
    del record["0"]
    (tmp_path / "runs.json").write_text(json.dumps(record))
    shown = told(*given)
    assert shown.exit_code == 2
    assert "losses before training" in shown.output
