"""The example of Velocitune from end to end, on made-up domains and a model of a few thousand weights."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("pyarrow")

from ghostgram.algorithms.velocitune.export import Mixture
from ghostgram.algorithms.velocitune.reading import read
from ghostgram.algorithms.velocitune.targets import Targets

ALPHABETS = {"python_code": "abcd", "cpp_headers": "efgh", "tech_docs": "ijkl"}


@pytest.fixture
def example(examples, made_up_words, monkeypatch):
    made_up_words(ALPHABETS)
    module = examples("velocitune")
    for name, value in {"LENGTH": 24, "BATCH": 4}.items():
        monkeypatch.setattr(module, name, value)
    return module


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
