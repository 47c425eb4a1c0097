"""The experiment from end to end on made-up text: killed, called again, and shown."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from ghostgram import data
from ghostgram.algorithms.velocitune.estimate import estimate_targets

SCRIPTS = Path(__file__).parents[3] / "benchmarks/algorithms"
ALPHABETS = {"python_code": "abcd", "cpp_headers": "efgh", "manuals": "ijkl", "licences": "mnop"}


def made_up(name):
    """Documents without words: halves of windows would stand in others."""
    generator = np.random.default_rng(len(name))
    return ["".join(generator.choice(list(ALPHABETS.get(name, "qrst")), 1000)) for _ in range(20)]


@pytest.fixture
def script(monkeypatch):
    """The script as a module, which leaves nothing behind."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(data, "load_text", made_up)
    before, paths = set(sys.modules), list(sys.path)
    module = importlib.import_module("velocitune_experiment")
    quick = partial(estimate_targets, resamples=20)  # intervals are most of the time otherwise
    monkeypatch.setattr(sys.modules["velocitune_runs"], "estimate_targets", quick)
    yield module
    sys.path[:] = paths
    for name in set(sys.modules) - before:
        if name.startswith("velocitune_"):
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore:evaluations have cost")
def test_a_killed_experiment_goes_on_and_is_shown(script, tmp_path, monkeypatch, capsys):
    settings = script.Settings(
        length=24, batch=4, width=8, heads=2, layers=1, warm_up=2, base_steps=8, steps=48, every=12, control=2, judge=4,
        seeds=1,
    )  # fmt: skip
    results, folder = tmp_path / "rows.json", tmp_path / "kept"
    arguments = ["--results", str(results), "--folder", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(script.Experiment, "replayed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            script.main(arguments, settings)
    before = json.loads(results.read_text())["rows"]
    assert "0 average" not in before
    script.main(arguments, settings)
    rows = json.loads(results.read_text())["rows"]
    assert {key: rows[key] for key in before} == before
    assert len(rows) == 1 + 2 + len(script.TOKENS) + len(script.COMPUTE)
    assert rows["0 paper"]["draws"] == rows["0 shuffled"]["draws"]
    assert rows["0 paper"]["weights"] != rows["0 shuffled"]["weights"]
    whole, step = rows["0 static"]["flops"]["train"], rows["0 static"]["flops"]["train"] / 48
    for arm in script.COMPUTE:
        flops = rows[f"0 compute {arm}"]["flops"]
        update = rows["0 paper"]["flops"]["updates"] / 4
        assert whole - step - update < sum(flops.values()) <= whole
    for arm in ("dbl", "paper", "robust"):  # what was planned is what the run has booked; one more is that of the start
        flops = rows[f"0 {arm}"]["flops"]
        assert rows[f"0 {arm}"]["evaluations"] == pytest.approx(flops["updates"] * 5 / 4)

    found = json.loads(results.read_text())
    for seed in ("1", "2"):  # as if there were three
        found["rows"] |= {seed + key[1:]: row for key, row in rows.items() if key.startswith("0 ")}
    three = script.Settings(**{**found["settings"], "prose": tuple(settings.prose), "seeds": 3})
    results.write_text(json.dumps({**found, "settings": json.loads(json.dumps(script.asdict(three)))}))
    capsys.readouterr()
    script.main([*arguments, "--table", "--figure", str(tmp_path / "figure.png")], three)
    shown = capsys.readouterr().out
    assert shown.count("not distinguishable") > 100
    assert "| Velocitune, `robust` | 48 |" in shown
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="results: expected settings"):
        script.main(arguments, settings)
