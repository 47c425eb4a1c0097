"""`ghostgram values`: its tables are the log's sums, whoever wrote the parts; what it cannot read it names."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

pa = pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
import pyarrow.parquet as pq  # noqa: E402

from ghostgram.algorithms.in_run_shapley import aggregate, ledger, log, timeline  # noqa: E402
from ghostgram.algorithms.in_run_shapley.reading import LogError, open_log  # noqa: E402
from ghostgram.cli.app import app  # noqa: E402

SETS, SAMPLES, STEPS, BATCH, SKIPPED = ("prose", "code"), 30, 40, 4, 3
METADATA = {"optimizer": "AdamW", "excluded": "[]"}


def write_steps(folder, rank, columns):
    """One rank's part of a log, in flushes of 10 steps; forward mode scores a parameter after the first."""
    table = log.PartedTable(log.step_schema(list(SETS), False, False, METADATA), folder / "steps" / rank, False)
    for start in range(0, STEPS, 10):
        rows = (columns["step"] >= start) & (columns["step"] < start + 10)
        constant = {"microbatch": 0, "clip": 1.0, "order": 1, "v_state": "pre", "g_val_age": 0, "rank": 0}
        constant |= {"weight": 1.0, **{f"candidate_{name}": None for name in SETS}}
        table.append({name: [each] * int(rows.sum()) for name, each in constant.items()}
                     | {name: column[rows].tolist() for name, column in columns.items()})  # fmt: skip
        table.note("fallback", json.dumps(["gate"] if start else []))
        table.flush()


def write_ledger(folder, generator, refresh):
    """A ledger as of validation gradients that serve `refresh` steps each; returns predictions and measurements."""
    predicted = generator.normal(-1, 0.1, (STEPS, 2))
    losses = 50 - np.cumsum(generator.normal(0.8, 0.1, (STEPS + 1, 2)), 0)
    cumulative = losses[1:] - losses[0] - np.cumsum(predicted, 0)
    table = log.PartedTable(log.ledger_schema(METADATA), folder / "ledger", False)
    for step in range(STEPS):
        row = {name: [None, None] for name in table._schema.names}
        row |= {"step": [step] * 2, "set": list(SETS), "predicted": predicted[step].tolist(),
                "sum_phi": (predicted[step] + 0.25).tolist(), "history": [-0.25] * 2, "uncovered": [0.0] * 2,
                "skipped": [step == SKIPPED] * 2, "audit": [step / 100 if step % 10 == 5 else None] * 2}  # fmt: skip
        if step % refresh == 0:
            row["l_before"] = losses[step].tolist()
        if (step + 1) % refresh == 0:
            row |= {"l_after": losses[step + 1].tolist(), "cumulative_residual": cumulative[step].tolist()}
        table.append(row)
    table.flush()
    return predicted, np.diff(losses[::refresh], axis=0)


@pytest.fixture(params=["one rank", "two ranks"])
def run(request, tmp_path):
    """A log of 40 steps with a learning rate of 0 in the first and one skipped step, and its columns."""
    generator, ranks = np.random.default_rng(0), 2 if request.param == "two ranks" else 1
    columns = []
    for rank in range(ranks):
        step = np.repeat(np.arange(STEPS), BATCH)
        moves = (step != SKIPPED) & (step > 0)
        mine = {
            "step": step,
            "sample_id": 1000 - 7 * generator.integers(0, SAMPLES, len(step)),  # neither sorted nor dense
            "lr": np.where(step > 0, np.float32(1e-3) * (1 + step), 0).astype(np.float32),
            "skipped": step == SKIPPED,
            **{f"phi_{name}": (generator.normal(0.2, 1, len(step)) * moves).astype(np.float32) for name in SETS},
        }
        columns.append(mine)
        write_steps(tmp_path / "log", f"rank-{rank:05d}" if ranks > 1 else "", mine)
    together = {name: np.concatenate([mine[name] for mine in columns]) for name in columns[0]}
    return tmp_path / "log", together, write_ledger(tmp_path / "log", generator, refresh=4 if ranks > 1 else 1)


def sums(columns, name, rows):
    return -np.sum(columns[f"phi_{name}"][rows], dtype=np.float64)


def test_every_sample_has_the_sum_of_its_rows(run):
    folder, columns, _ = run
    table = aggregate.by_sample(open_log(folder))
    assert table.schema.names == [
        *("sample_id", "source", "times_seen", "first_step", "last_step"),
        *(f"{kind}_{name}" for name in SETS for kind in ("value", "value_per_lr", "value_share")),
    ]
    assert table["sample_id"].to_pylist() == sorted(set(columns["sample_id"].tolist()))
    moved = {name: sum(abs(v) for v in table[f"value_{name}"].to_pylist()) for name in SETS}
    for row in table.to_pylist():
        mine = columns["sample_id"] == row["sample_id"]
        assert row["times_seen"] == (mine & ~columns["skipped"]).sum()
        assert (row["first_step"], row["last_step"]) == (columns["step"][mine].min(), columns["step"][mine].max())
        for name in SETS:
            assert row[f"value_{name}"] == pytest.approx(sums(columns, name, mine), rel=1e-13, abs=1e-15)
            assert row[f"value_share_{name}"] == pytest.approx(row[f"value_{name}"] / moved[name], rel=1e-13)
            moving = mine & (columns["lr"] > 0)
            per_lr = -np.sum(columns[f"phi_{name}"][moving].astype(float) / columns["lr"][moving].astype(float))
            assert row[f"value_per_lr_{name}"] == pytest.approx(per_lr, rel=1e-13)


def test_sums_have_the_same_bits_every_time(run):
    folder, _, _ = run
    assert all(aggregate.by_sample(open_log(folder)).equals(aggregate.by_sample(open_log(folder))) for _ in range(3))


@pytest.fixture
def sources(run, tmp_path):
    """A file of sources for all samples but three: id -> source."""
    known = {int(i): "plays" if i % 2 else 'web, "dirty"' for i in np.unique(run[1]["sample_id"])[:-3]}
    with (tmp_path / "sources.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "domain"), *known.items(), (5, "never seen")])
    return tmp_path / "sources.csv", known


def test_sources_add_up_and_what_is_not_named_is_unknown(run, sources):
    folder, columns, _ = run
    path, known = sources
    samples = aggregate.by_sample(open_log(folder), path)
    table = aggregate.by_source(samples, SETS)
    found = {row["source"]: row for row in table.to_pylist()}
    assert set(found) == {"plays", 'web, "dirty"', "unknown"}
    assert found["unknown"]["samples"] == 3
    assert table["value_prose"].to_pylist() == sorted(table["value_prose"].to_pylist(), reverse=True)
    of_row = np.array([known.get(int(i), "unknown") for i in columns["sample_id"]])
    for source, row in found.items():
        assert row["times_seen"] == ((of_row == source) & ~columns["skipped"]).sum()
        for name in SETS:
            assert row[f"value_{name}"] == pytest.approx(sums(columns, name, of_row == source), rel=1e-12)
            mine = [r[f"value_{name}"] for r in samples.to_pylist() if r["source"] == source]
            assert row[f"negative_{name}"] == pytest.approx(np.mean(np.array(mine) < 0))
            assert row[f"mean_value_{name}"] == pytest.approx(np.mean(mine))


@pytest.mark.parametrize("suffix", [".parquet", ".tsv"])
def test_sources_come_in_other_files_too(run, tmp_path, suffix):
    ids = np.unique(run[1]["sample_id"])
    path = tmp_path / f"sources{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"sample_id": ids, "source": ["a"] * len(ids)}), path)
    else:
        path.write_text("sample_id\tsource\n" + "".join(f"{i}\ta\n" for i in ids))
    assert set(aggregate.by_sample(open_log(run[0]), path)["source"].to_pylist()) == {"a"}


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("s.csv", "sample_id,kind\n1,a\n", "expected a column source or domain, got sample_id, kind"),
        ("s.csv", "sample_id,source\n7,a\n7,b\n", "sample 7 is named more than once"),
        ("s.csv", "sample_id,source\nx,a\n", "cannot be read as a file of sources"),
        ("s.parquet", "not Parquet", "cannot be read as a file of sources"),
        ("s.json", "{}", r"expected a file of sources ending in \.parquet, \.csv, \.tsv"),
    ],
)
def test_bad_sources_are_named(run, tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(LogError, match=complaint):
        aggregate.by_sample(open_log(run[0]), tmp_path / name)


@pytest.mark.parametrize("bins", [1, 7, 200])
def test_stretches_cover_the_run_and_add_up(run, sources, bins):
    folder, columns, (predicted, measured) = run
    opened = open_log(folder)
    course = timeline.values_over_time(opened, STEPS, bins)
    growth = timeline.sources_over_time(opened, aggregate.by_sample(opened, sources[0]), STEPS, bins)
    sums_of_ledger = ledger.ledger_over_time(opened, STEPS, bins)
    for k, name in enumerate(SETS):
        rows = [row for row in course.to_pylist() if row["set"] == name]
        covered = [step for row in rows for step in range(row["first_step"], row["last_step"] + 1)]
        # With a stretch for every step, the skipped one has no row to show.
        assert covered == [step for step in range(STEPS) if bins < STEPS or step != SKIPPED]
        for row in rows:
            mine = (columns["step"] >= row["first_step"]) & (columns["step"] <= row["last_step"]) & ~columns["skipped"]
            value = -columns[f"phi_{name}"][mine].astype(float)
            assert row["rows"] == mine.sum()
            assert row["value"] == pytest.approx(value.sum(), rel=1e-12)
            assert row["negative"] == pytest.approx((value < 0).mean())
            quantiles = [row[q] for q in ("q05", "q25", "q50", "q75", "q95")]
            assert quantiles == sorted(quantiles)
            assert value.min() <= quantiles[0]
            assert quantiles[-1] <= value.max()
            of_sources = [r for r in growth.to_pylist() if (r["set"], r["first_step"]) == (name, row["first_step"])]
            assert sum(r["value"] for r in of_sources) == pytest.approx(value.sum(), rel=1e-12)
        total = ledger.ledger_totals(sums_of_ledger, name)
        assert (total.steps, total.skipped, total.measurements) == (STEPS, 1, len(measured))
        assert total.measured == pytest.approx(measured[:, k].sum())
        assert total.predicted == pytest.approx(predicted[:, k].sum())
        assert (total.history, total.uncovered) == (pytest.approx(-0.25 * STEPS), 0)
        residual = measured[:, k] - predicted[:, k].reshape(len(measured), -1).sum(1)
        assert total.residual == pytest.approx(residual.sum())
        assert total.relative_residual == pytest.approx(np.sqrt(np.mean(residual**2) / np.mean(measured[:, k] ** 2)))
        assert (total.audits, total.worst_audit) == (4, 0.35)


def table_of(values):
    return pa.table({"sample_id": np.arange(len(values)), "value_v": pa.array(values, pa.float64())})


def test_spread_and_extremes_of_known_values():
    samples = table_of([4.0, -1.0, None, 0.0, float("nan"), -3.0, 4.0])
    spread = aggregate.spread(samples, "v")
    assert (spread.samples, spread.unvalued, spread.total) == (5, 2, 4.0)
    assert spread.negative == pytest.approx(2 / 5)
    sizes = np.array([0, 1, 3, 4, 4.0])
    pairs = np.abs(sizes[:, None] - sizes[None, :]).sum() / (2 * len(sizes) ** 2 * sizes.mean())
    assert spread.gini == pytest.approx(pairs)
    assert spread.top_percent == pytest.approx(4 / 12)
    assert spread.quantiles["0.5"] == 0.0
    best, worst = aggregate.extremes(samples, "v", 3)
    assert best["sample_id"].to_pylist() == [0, 6, 3]
    assert worst["sample_id"].to_pylist() == [5, 1, 3]


@pytest.mark.parametrize("values", [[0.0, 0.0], [None, None]])
def test_spread_of_nothing(values):
    spread = aggregate.spread(table_of(values), "v")
    assert spread.unvalued == values.count(None)
    assert spread.gini == 0 or np.isnan(spread.gini)


def test_orders_are_compared_where_both_are_logged(run, tmp_path):
    generator = np.random.default_rng(0)
    second = generator.normal(size=(50, 2))
    first = second + 0.1 * generator.normal(size=(50, 2))
    table = log.PartedTable(log.step_schema(list(SETS), True, True, METADATA), tmp_path / "both/steps", False)
    constant = {"microbatch": 0, "clip": 1.0, "order": 2, "v_state": "post", "g_val_age": 0, "rank": 0, "lr": 0.1}
    constant |= {"weight": 1.0, **{f"candidate_{name}": None for name in SETS}}
    rows = {name: [each] * 51 for name, each in constant.items()}
    rows |= {"step": range(51), "sample_id": range(51), "skipped": [False] * 50 + [True]}
    for k, name in enumerate(SETS):
        rows |= {f"phi_{name}": [*second[:, k], 0.0], f"phi1_{name}": [*first[:, k], 0.0]}
    table.append(rows)
    table.flush()
    opened = open_log(tmp_path / "both")
    assert opened.sets == SETS
    for k, name in enumerate(SETS):
        gap = aggregate.order_gap(opened, name)
        assert gap.correlation == pytest.approx(np.corrcoef(second[:, k], first[:, k])[0, 1])
        assert gap.relative_norm == pytest.approx(
            np.linalg.norm(second[:, k] - first[:, k]) / np.linalg.norm(second[:, k])
        )
    result = invoke(tmp_path / "both")
    assert "order 1 against 2, correlation" in result.output
    assert aggregate.order_gap(open_log(run[0]), "prose") is None
    assert "order 1 against 2" not in invoke(run[0]).output


def invoke(*arguments):
    return CliRunner().invoke(app, ["values", *map(str, arguments)], env={"COLUMNS": "120"})


def test_tables_figures_and_files(run, sources, tmp_path):
    folder, _, _ = run
    out = tmp_path / "out"
    result = invoke(folder, "--sources", sources[0], "--out", out, "--figures", "png", "--top", 2)
    assert result.exit_code == 0, result.output
    for word in (
        *("Values", "Sources, judged by prose", 'web, "dirty"', "unknown", "3 samples are not named", "AdamW"),
        *("Most helpful and most harmful samples, judged by code", "RMS of residual", "of 40 steps", "3.5e-01 of 4"),
    ):
        assert word in result.output, word
    assert pq.read_table(out / "samples.parquet").equals(aggregate.by_sample(open_log(folder), sources[0]))
    assert {path.name for path in out.iterdir()} == {
        *("samples.parquet", "sources.csv", "growth.csv", "over_time.csv", "ledger.csv"),
        *("spread.png", "over_time.png", "ledger.png", "sources.png"),
    }
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in out.glob("*.png"))
    with (out / "sources.csv").open() as file:
        assert {row["source"] for row in csv.DictReader(file)} == {"plays", 'web, "dirty"', "unknown"}


def test_json_holds_the_numbers(run):
    folder, columns, _ = run
    result = invoke(folder, "--json", "--top", 3)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert (found["steps"], found["rows"]) == (STEPS, len(columns["step"]))
    assert found["samples"] == len(set(columns["sample_id"].tolist()))
    assert found["sources"] is None
    assert found["metadata"]["fallback"] == '["gate"]'  # as the last part has it
    for name in SETS:
        assert found["sets"][name]["total"] == pytest.approx(sums(columns, name, slice(None)))
        assert len(found["sets"][name]["best"]) == len(found["sets"][name]["worst"]) == 3
        assert found["sets"][name]["ledger"]["steps"] == STEPS


def test_a_log_without_a_ledger_yet_is_read(run, tmp_path):
    folder, _, _ = run
    for part in (folder / "ledger").iterdir():
        part.unlink()
    result = invoke(folder, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "no part of the ledger has been written yet" in result.output
    assert not (tmp_path / "out/ledger.svg").exists()


def test_parts_that_were_never_renamed_are_left_alone(run):
    folder, _, _ = run
    before = aggregate.by_sample(open_log(folder))
    (folder / "steps/part-0000000040-0000000049.tmp").write_bytes(b"PAR1 torn")
    assert aggregate.by_sample(open_log(folder)).equals(before)


def spoil(folder, how):
    """Spoils a log in one way."""
    part = min(folder.glob("steps/**/*.parquet"))
    if how == "torn":
        part.write_bytes(part.read_bytes()[:-20])
    elif how == "other sets":
        table = pq.read_table(part)
        other = table.rename_columns([name.replace("code", "else") for name in table.column_names])
        pq.write_table(other.replace_schema_metadata(table.schema.metadata), part.with_name("part-9.parquet"))
    elif how == "other sign":
        pq.write_table(pq.read_table(part).replace_schema_metadata({"sign": "value = phi"}), part)
    elif how == "no phi":
        for each in folder.glob("steps/**/*.parquet"):
            pq.write_table(pq.read_table(each).drop_columns(["phi_prose", "phi_code"]), each)
    elif how == "empty":
        for each in folder.glob("steps/**/*.parquet"):
            each.unlink()


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("torn", "not a whole Parquet file"),
        ("other sets", "parts of two runs in one folder"),
        ("other sign", "expected the metadata sign"),
        ("no phi", "not a step log"),
        ("empty", "not a log: it has no steps"),
    ],
)
def test_a_spoiled_log_is_refused(run, how, complaint, tmp_path):
    spoil(run[0], how)
    result = invoke(run[0], "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert complaint in result.output
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_is_named(tmp_path):
    result = invoke(tmp_path / "nowhere")
    assert result.exit_code == 2
    assert f"{tmp_path / 'nowhere'}: no such folder" in result.output


def test_reading_a_log_needs_no_torch(run):
    code = "import sys; from ghostgram.cli.app import app; app(standalone_mode=False); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "values", run[0], "--json"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
