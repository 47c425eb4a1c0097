"""The example of PAD from end to end, on small pictures."""

import sys
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from algorithms.pad.pictures import NAMES, SETTINGS, pictures
from ghostgram import data
from ghostgram.algorithms.pad import run
from ghostgram.data.images import Images


@pytest.fixture
def example(examples, monkeypatch):
    (train, labels), (test, test_labels) = pictures(), pictures(60, 1)
    found = Images(train.numpy(), labels.numpy(), test.numpy(), test_labels.numpy(), NAMES)
    monkeypatch.setattr(data, "load_images", lambda name, root=None: found)
    monkeypatch.setattr(run, "named", lambda name: replace(SETTINGS, controls=False))
    return examples("pad")


def test_example(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pad.py", "--out", str(tmp_path), "--iterations", "4", "--seed", "5"])
    example.main()
    assert "distilled" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6
