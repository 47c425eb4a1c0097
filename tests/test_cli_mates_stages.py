"""`ghostgram mates label`, `fit`, `score` and `select` are the stages of `mates`, one at a time, and refuse by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("typer")

from typer.testing import CliRunner

import ghostgram as gg
from algorithms.mates.models import TASK, reference, trained
from algorithms.mates.training import pool_of, write_pool
from ghostgram.algorithms.mates.files.store import Stage
from ghostgram.cli import mates_stages
from ghostgram.cli.app import app
from ghostgram.cli.mates_settings import Settings

SETTINGS = """
run = "run"
seed = 3
[pool]
paths = "pool/*.parquet"
domain = "source"
n_tokens = "n"
[job]
function = "my_training:job"
seed = 0
[label]
labels = 120
backend = "exact"
clip = 1.0
audit = 0
[score]
workers = 1
[select]
docs = 50
temperature = 0.5
quotas = { web = [0.2, 0.6] }
"""
JOB = """
from algorithms.mates.models import TASK, reference, trained

def job(seed):
    model, optimizer = trained()
    return model, optimizer, reference(seed=1 + seed), TASK
"""
COMMANDS = ("label", "fit", "score", "select")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a pool, a module with a job, and settings."""
    write_pool(tmp_path / "pool")
    (tmp_path / "my_training.py").write_text(JOB)
    (tmp_path / "mates.toml").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_training", None)


def told(command, *arguments):
    return CliRunner().invoke(app, ["mates", command, "mates.toml", *arguments])


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_four_commands_are_one_call_of_mates(here, monkeypatch):
    for command in COMMANDS:
        done = told(command)
        assert done.exit_code == 0, (command, done.output, done.exception)
    made = gg.mates(
        *trained(), pool_of(Path("pool")), reference(), TASK, "python", labels=120, backend="exact", clip=1.0, audit=0,
        workers=1, docs=50, temperature=0.5, quotas={"web": (0.2, 0.6)}, seed=3, progress=False,
    )  # fmt: skip
    assert len(made.plan) == 50
    assert files(here / "run") == files(here / "python")

    def fail(*args, **named):
        raise AssertionError("done again")

    monkeypatch.setattr("ghostgram.algorithms.mates.labels.rows.Rows.labelled", fail)
    monkeypatch.setattr("ghostgram.algorithms.mates.influence.model.fit", fail)
    monkeypatch.setattr("ghostgram.algorithms.mates.scoring.score.run_units", fail)
    monkeypatch.setattr("ghostgram.algorithms.mates.stages.select", fail)
    before = files(here / "run")
    expected = ("120 labels by exact", "held-out", "440 documents", "50 documents")
    for command, said in zip(COMMANDS, expected, strict=True):
        again = told(command)
        assert again.exit_code == 0, (command, again.output, again.exception)
        assert said in again.output
        manifest = json.loads(told(command, "--json").output)
        assert (manifest["kind"], manifest["state"]) == (command, "complete")
    assert files(here / "run") == before
    drawn = {}
    monkeypatch.setattr(mates_stages, "select_scored", lambda *given: drawn.update(given[4]) or [None])
    (here / "mates.toml").write_text(SETTINGS + "[select.weights]\nkept = 2.0\n")
    mates_stages.select(Settings.read(here / "mates.toml"), 1, "")
    assert drawn["combine"] == {"kept": 2.0}


def test_as_a_command_of_the_shell(here):
    """Which finds modules of the working directory, and starts processes of its own to score."""
    paths = os.pathsep.join(path for path in sys.path if path)
    script = "if __name__ == '__main__':\n    from ghostgram.cli import main\n    main()\n"
    (here / "ghostgram_command.py").write_text(script)
    for command in ("label", "score"):
        line = [sys.executable, "ghostgram_command.py", "mates", command, "mates.toml", "--stage", "2"]
        done = subprocess.run(line, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"run/stage-2/{command}/" in done.stdout
        assert command == "score" or told("fit", "--stage", "2").exit_code == 0


def test_of_several_the_key_tells_which(here):
    for audit in (0, 9):
        (here / "mates.toml").write_text(SETTINGS.replace("audit = 0", f"audit = {audit}"))
        assert told("label").exit_code == 0
    refused = told("fit")
    assert refused.exit_code == 2
    keys = sorted(path.name for path in Path("run/stage-1/label").iterdir())
    assert all(f"{key[:12]} (complete)" in refused.stderr for key in keys)
    assert "--of tells which" in refused.stderr
    assert told("fit", "--of", keys[1][:12]).exit_code == 0
    (fitted,) = Path("run/stage-1/fit").iterdir()
    labels = Stage("run", 1, "label", keys[1]).require()["logical"]
    assert Stage("run", 1, "fit", fitted.name).require()["labels"] == labels


def test_what_is_not_complete_is_not_gone_on_from(here):
    refused = told("score")
    assert refused.exit_code == 2
    assert "stage-1/fit: expected one complete 'fit', got none" in refused.stderr
    Stage("run", 1, "fit", "abc").begin()
    assert "got abc (not complete)" in told("score").stderr
    (here / "mates.toml").write_text(SETTINGS.replace("workers = 1", 'scorer = "nowhere"'))
    refused = told("score")
    assert refused.exit_code == 2
    assert "nowhere" in refused.stderr


def test_a_fit_starts_from_the_model_that_is_named_and_tells_its_drift(here):
    for command in ("label", "fit"):
        assert told(command).exit_code == 0
    (first,) = Path("run/stage-1/fit").iterdir()
    held = SETTINGS + f'[fit]\nprevious = "{first}/model"\nencoder = {{ kind = "ngram", bits = 10 }}\n'
    (here / "mates.toml").write_text(held)
    assert told("label", "--stage", "2").exit_code == 0
    done = told("fit", "--stage", "2")
    assert done.exit_code == 2  # of 2^18 columns, to be gone on with in 2^10
    (here / "mates.toml").write_text(held.replace(", bits = 10", ""))
    done = told("fit", "--stage", "2")
    assert done.exit_code == 0, done.output
    assert "the model before kept" in done.output
    (second,) = (path for path in Path("run/stage-2/fit").iterdir() if (path / "model").exists())
    assert Stage("run", 2, "fit", second.name).require()["previous"]


def test_documents_that_were_not_labelled_are_refused(here):
    assert told("label").exit_code == 0
    (here / "mates.toml").write_text(SETTINGS.replace("labels = 120", "labels = 121"))
    refused = told("fit")
    assert refused.exit_code == 2
    assert "expected those that were labelled" in refused.stderr


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('run = "run"', "", "expected 'run', got none"),
        ('paths = "pool/*.parquet"', "", "expected 'paths' in [pool], got none"),
        ('run = "run"', "run = 3", "run: expected str, got 3"),
        ("seed = 3", "sead = 3", "expected run, seed and tables pool, job, label, fit, score, select, got 'sead'"),
        ("audit = 0", "audits = 0", "[label] expected labels, backend, clip, lrs, audit, accept_rho, got 'audits'"),
        ("audit = 0", "audit = true", "[label] audit: expected int, got True"),
        ("[job]", "[", "expected a file of settings in TOML"),
        ("my_training:job", "my_training:jobs", "expected 'module:name' of something that can be imported"),
        ("my_training:job", "my_trainings:job", "No module named 'my_trainings'"),
        ('function = "my_training:job"', "", "[job] expected a function"),
        ("my_training:job", "my_training:reference", "[job] my_training:reference: expected (model, optimizer"),
        ('"exact"', '"fast"', "backend: expected auto"),
    ],
)
def test_wrong_settings_are_named(here, before, after, message):
    assert before in SETTINGS
    (here / "mates.toml").write_text(SETTINGS.replace(before, after))
    refused = told("label")
    assert refused.exit_code == 2, refused.exception
    assert message in refused.stderr
    assert not (here / "run").exists()


def test_a_job_that_fails_shows_where(here):
    (here / "my_training.py").write_text("def job(seed):\n    raise ValueError('no such checkpoint')\n")
    failed = told("label")
    assert failed.exit_code == 1
    assert str(failed.exception) == "[job] my_training:job failed"
    assert str(failed.exception.__cause__) == "no such checkpoint"


def test_encoders_have_settings_of_their_own(here):
    def encoder(text):
        (here / "mates.toml").write_text(SETTINGS + text)
        return Settings.read(here / "mates.toml").encoder()

    assert encoder("") == "auto"
    assert encoder('[fit]\nencoder = "ngram"').kind == "ngram"
    assert encoder('[fit.encoder]\nkind = "ngram"\nbits = 11').bits == 11
    assert encoder('[fit.encoder]\nkind = "embedding"\nembed = "my_training:job"').embed.__name__ == "job"
    with pytest.raises(ValueError, match="encoder: expected one of ngram, embedding, hf, got 'bert'"):
        encoder('[fit]\nencoder = "bert"')
    with pytest.raises(ValueError, match=r"\[fit.encoder\] .*unexpected keyword argument 'depth'"):
        encoder('[fit.encoder]\nkind = "ngram"\ndepth = 3')
