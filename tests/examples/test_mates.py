"""The example of MATES from end to end, on a few documents of made-up domains and a model of a few thousand weights."""

import json
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")


ALPHABETS = {"python_code": "abcd", "cpp_headers": "efgh", "shakespeare": "ijkl", "austen": "ijklm"}


@pytest.fixture
def example(examples, made_up_words, monkeypatch):
    made_up_words(ALPHABETS)
    module = examples("mates")
    for name, value in {"WINDOW": 24, "WIDTH": 16, "LAYERS": 1, "HEADS": 2, "REFERENCE": 80, "TEST": 16}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module.Reference, "from_texts", classmethod(without_evaluation(module.Reference.from_texts)))
    return module


def without_evaluation(from_texts):
    """Made-up words repeat themselves, in the test too."""
    return lambda cls, name, texts, task, **_: from_texts(name, texts, task)


def test_every_arm_is_trained_and_told_of(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(example, "ARMS", [*example.ARMS[:4], "perplexity, equal FLOPs"])  # one of three, which are long
    arguments = ["--out", tmp_path, "--seeds", 0, 1, "--each", 260, "--warm-up", 4, "--stage-steps", 3]
    monkeypatch.setattr(sys, "argv", ["mates.py", *map(str, arguments), "--labels", "640", "--audit", "16"])
    example.main()
    printed = capsys.readouterr().out
    assert "going on without kjv: kjv: the registry is closed" in printed
    assert "learning curve" in printed
    found = json.loads((tmp_path / "results.json").read_text())["seeds"]
    assert set(found) == {"0", "1"}
    for seed in found.values():
        steps = {arm: run["step"][-1] for arm, run in seed.items()}
        assert steps["mates"] == steps["random"] == steps["perplexity"] == steps["classifier"] == 6
        assert [stage["stage"] for stage in seed["mates"]["stages"]] == [1, 2]
        assert all(sum(stage["domains"].values()) == 3 * 32 for stage in seed["mates"]["stages"])
        spent = seed["mates"]["flops"]
        assert all(spent[kind] > 0 for kind in ("train", "label", "fit", "score")) or spent["audit"] > 0
        equal = seed["perplexity, equal FLOPs"]
        assert sum(equal["flops"].values()) == pytest.approx(sum(spent.values()), rel=0.1)
        assert equal["steps"] == equal["step"][-1] > 6
    assert {path.name for path in tmp_path.glob("*.png")} == {"arms.png", "domains.png", "learning.png"}
    example.main()  # what is done is read
    assert json.loads((tmp_path / "results.json").read_text())["seeds"] == found


def test_it_needs_the_novels(example, monkeypatch, tmp_path):
    monkeypatch.setattr(example, "NOVELS", "kjv")
    monkeypatch.setattr(sys, "argv", ["mates.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="needs the novels"):
        example.main()
