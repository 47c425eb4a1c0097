"""The example of Velocitune from end to end, on made-up domains and a model of a few thousand weights."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pyarrow")

from ghostgram import data
from ghostgram.algorithms.velocitune.export import Mixture
from ghostgram.algorithms.velocitune.reading import read
from ghostgram.algorithms.velocitune.targets import Targets

ALPHABETS = {"python_code": "abcd", "cpp_headers": "efgh", "tech_docs": "ijkl"}


@pytest.fixture
def example(monkeypatch):
    def load_text(name):
        generator = np.random.default_rng(len(name))
        words = ["".join(generator.choice(list(ALPHABETS[name]), 3)) for _ in range(30)]
        return [" ".join(generator.choice(words, 300)) for _ in range(20)]

    monkeypatch.setattr(data, "load_text", load_text)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    before = set(sys.modules)
    module = importlib.import_module("velocitune")
    for name, value in {"LENGTH": 24, "BATCH": 4}.items():
        monkeypatch.setattr(module, name, value)
    yield module
    for name in set(sys.modules) - before:
        if name in ("tiny_lm", "velocitune"):
            del sys.modules[name]


def test_the_example_runs_whole(example, tmp_path, capsys):
    out = tmp_path / "out"
    example.main(["--out", str(out), "--steps", "75", "--width", "16"])
    found = json.loads((out / "found.json").read_text())
    assert list(found) == ["proportional", "paper", "robust"]
    targets = Targets.load(out / "targets.json")
    for arm in found:
        made, course = Mixture.load(out / f"{arm}.json"), read(out / arm)
        assert made.mean.tolist() == found[arm]["mean"]
        assert course.weights[-1].tolist() == made.final.tolist()
        assert course.step[-1] == 75
        assert len(course.step) == 25
        assert all(found[arm]["loss"][name] < targets.by_domain[name].l_init for name in ("python_code", "cpp_headers"))
    assert found["paper"]["mean"] != found["proportional"]["mean"]
    assert "What each has reached" in capsys.readouterr().out
