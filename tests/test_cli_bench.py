"""`ghostgram bench`: it validates, times and draws what is here, names what is not, fails where a kernel is wrong."""

import json

import pytest
from typer.testing import CliRunner

from ghostgram import _dispatch
from ghostgram.cli import bench, bench_step
from ghostgram.cli.app import app
from ghostgram.report.roofline import Point, roofline
from ghostgram.testing import layouts, plain, turns
from ghostgram.testing.compare import cases_of, compare

FAST = ["--seconds", "0.001"]


@pytest.fixture(autouse=True)
def small_memory(monkeypatch):
    measure = bench.roofline.measure
    monkeypatch.setattr(bench.roofline, "measure", lambda seconds, dtype: measure(seconds, dtype, 4 << 20))
    monkeypatch.setattr(turns, "CACHE_BYTES", 1 << 20)


@pytest.fixture
def tiny(monkeypatch):
    cases = cases_of("grad_gram")
    monkeypatch.setattr(cases, "TYPICAL", [cases.Case(3, 4, 20, 15), cases.Case(5, 2, 9, 8, diagonal=True)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_json_has_every_way_and_names_what_is_absent(tiny, dtype):
    result = CliRunner().invoke(app, ["bench", "grad_gram", *FAST, "--json", "--dtype", dtype])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    ours = [row for row in found["rows"] if row["ours"]]
    assert {(row["shape"], row["cache"]) for row in ours if row["way"] == "cpu"} == {
        (shape, cache) for shape in ("B3T4d20p15-symmetric", "B5T2d9p8-diagonal") for cache in ("warm", "cold")
    }
    assert {row["way"] for row in found["rows"] if not row["ours"]} == {"products of tokens stored", "gradients stored"}
    for row in ours:
        assert 0 <= row["error_over_bound"] <= 1
        assert row["gflops"] / row["gbytes"] == pytest.approx(row["intensity"])
        assert row["percent_of_roof"] > 0 or row["way"] != "cpu"
    absent = {backend for backend in bench.BACKENDS if _dispatch.why_not("grad_gram", backend)}
    assert absent <= set(found["absent"]["grad_gram"])


def test_tables_and_figure(tiny, tmp_path):
    figure = tmp_path / "roof.png"
    result = CliRunner().invoke(app, ["bench", "grad_gram", *FAST, "--plot", str(figure)], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for word in ("B3T4d20p15-symmetric", "cpu", "gradients stored", "GFLOP/s", "cuda is not here for all ops"):
        assert word in result.output
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_kernel_fails(tiny, monkeypatch):
    monkeypatch.setattr(bench, "error_over_bound", lambda *_: {"out": 1.01})
    result = CliRunner().invoke(app, ["bench", "grad_gram", *FAST], env={"COLUMNS": "120"})
    assert result.exit_code == 1
    assert "WRONG" in result.output


def test_a_step_is_timed_beside_the_plain_one(monkeypatch):
    monkeypatch.setattr(bench_step, "SAMPLES", 2)
    monkeypatch.setattr(bench_step, "TOKENS", 8)
    result = CliRunner().invoke(app, ["bench", "step", *FAST, "--layers", "1", "--width", "8", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["over_plain"].keys() == {"plain", "InRunShapley, order 1", "InRunShapley, order 2"}
    assert found["over_plain"]["plain"] == 1
    assert all(seconds > 0 for seconds in found["seconds"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grad_grams"], "expected step, all or one of adam_dots"),
        (["grad_gram", "--plot", "roof.jpg"], "expected a name that ends in .png or .svg"),
        (["step", "--width", "10"], "expected a multiple of 4, got 10"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("op", "way", "case", "names"),
    [
        ("grad_stats", "gradients stored", (3, 4, 6, 5, 1), ("weight_grad", "norms2", "dots")),
        ("grad_gram", "products of tokens stored", (3, 4, 6, 5), ("out",)),
        ("grad_gram", "gradients stored", (3, 4, 6, 5, (2, 7)), ("out",)),
        ("embedding_stats", "equal tokens by sorting", (3, 8, 5, 6, 1), ("norms2", "dots")),
        ("adam_dots", "gradients and steps stored", (3, 4, 6, 5, 1), ("out",)),
    ],
)
def test_plain_expressions_compute_the_op(op, way, case, names):
    cases = cases_of(op)
    case = cases.Case(*case)
    values = cases.inputs(case, "float64")
    made = cases.arrays(case, values, layouts.torch_array, "float64")
    found = plain.expressions(op, case, made)[way]()
    found = dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))
    truth = cases.run(case, cases.arrays(case, values, layouts.numpy_array, "float64"), "reference")
    expected = {name: truth[name] for name in names}
    scales = {name: cases.scales(case, values)[name] for name in names}
    assert max(compare(found, expected, scales, 1e-13).values()) <= 1


def test_rounds_fit_into_the_budget():
    calls = {"a": 0, "b": 0}

    def call(name):
        calls[name] += 1

    ways = {name: lambda name=name: call(name) for name in calls}
    found = turns.within(0.0, lambda way: way() or 2.0, ways)
    assert found == {"a": 2.0, "b": 2.0}
    assert calls == {"a": 5, "b": 5}  # one that is not counted, one that is measured, three


def test_points_on_top_of_each_other_are_numbered_apart(tmp_path):
    points = [Point("grad_gram", "one", "cpu", 1.0, 10.0), Point("grad_stats", "other", "cuda", 1.01, 10.1)]
    roofline(tmp_path / "roof.svg", points, 100.0, 20.0, "A processor")
    assert all(text in (tmp_path / "roof.svg").read_text() for text in ("grad_gram, cpu", "other", "slope: 20 GB/s"))
