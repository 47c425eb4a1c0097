from html.parser import HTMLParser

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

from ghostgram.report.html import write_report  # noqa: E402
from ghostgram.report.summary import summarise  # noqa: E402

SETS, DOMAINS = ("prose", "code"), ("plays", '<modules> & "more"')
DOCUMENTS, STEPS, BATCH = 60, 20, 6


@pytest.fixture
def run():
    """A run of 20 steps over 60 documents, each seen twice; the corrupted ones earn less."""
    generator = np.random.default_rng(0)
    ids = 1000 - 7 * np.arange(DOCUMENTS)  # neither sorted nor dense
    corrupted = np.arange(DOCUMENTS) % 10 == 3
    row = np.concatenate([generator.permutation(DOCUMENTS), generator.permutation(DOCUMENTS)])
    phi = {name: (generator.normal(-2, 1, len(row)) + 3 * corrupted[row]).astype(np.float32) for name in SETS}
    steps = pa.table(
        {"step": np.repeat(np.arange(STEPS, dtype=np.int32), BATCH), "sample_id": ids[row]}
        | {f"phi_{name}": column for name, column in phi.items()}
    )
    values = pa.concat_tables(
        pa.table(
            {
                "id": ids,
                "set": [name] * DOCUMENTS,
                "value": -np.bincount(row, weights=phi[name], minlength=DOCUMENTS),
                "steps": np.full(DOCUMENTS, 2),
            }
        )
        for name in SETS
    )
    ledger = pa.Table.from_pylist(
        [
            {
                "step": step,
                "set": name,
                "measured": None if step == STEPS - 1 else -0.5 - 0.01 * step,
                "predicted": -0.6,
                "sum_phi": -0.5,
                "history": -0.1,
                "uncovered": 0.0,
            }
            for step in range(STEPS)
            for name in SETS
        ]
    )
    return {
        "values": values,
        "steps": steps,
        "ledger": ledger,
        "documents": {
            "id": ids,
            "domain": np.array(DOMAINS, dtype=object)[np.arange(DOCUMENTS) % 2],
            "text": [f"<script>alert({i})</script> & \xff\x00".encode("latin1") for i in range(DOCUMENTS)],
        },
        "corrupted": corrupted,
        "timings": {"plain": [1.0, 2.0, 9.0], "instrumented": [2.5, 3.0, 3.5]},
    }


class Page(HTMLParser):
    """Collects what the tests ask of a page, and that its tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.labels = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [value for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
        self.labels += [attributes["aria-label"]] if tag == "figure" else []
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_values_are_aligned_with_the_documents(run):
    summary = summarise(**run)
    ids = list(run["documents"]["id"])
    by_id = {(row["set"], row["id"]): row["value"] for row in run["values"].to_pylist()}
    assert summary.sets == SETS
    assert all(summary.value[name][i] == by_id[name, ids[i]] for name in SETS for i in range(DOCUMENTS))
    np.testing.assert_array_equal(summary.mean_value, (summary.value["prose"] + summary.value["code"]) / 2)


def test_low_values_are_what_finds_corrupted_documents(run):
    summary = summarise(**run)
    assert summary.detection.auroc > 0.95
    flipped = run | {"corrupted": ~run["corrupted"]}
    assert summarise(**flipped).detection.auroc == pytest.approx(1 - summary.detection.auroc)
    assert len(summary.detection_by_stage) == 4
    assert min(summary.detection_by_stage) > 0.8


def test_growth_ends_at_the_mean_value_of_each_group(run):
    summary = summarise(**run)
    domain, corrupted = run["documents"]["domain"], run["corrupted"]
    for name in SETS:
        assert list(summary.growth[name]) == [*DOMAINS, "corrupted"]
        for group, total in summary.growth[name].items():
            mine = corrupted if group == "corrupted" else (domain == group) & ~corrupted
            assert len(total) == STEPS
            assert total[-1] == pytest.approx(summary.value[name][mine].mean(), rel=1e-6)


def test_ledger_leaves_out_what_was_not_measured(run):
    summary = summarise(**run)
    series = summary.ledger["prose"]
    assert list(series.step) == list(range(STEPS - 1))
    assert summary.predicted == pytest.approx(2 * 19 * -0.6)
    assert summary.measured == pytest.approx(2 * sum(-0.5 - 0.01 * step for step in range(19)))
    residual = np.array([0.1 - 0.01 * step for step in range(19)])
    measured = np.array([-0.5 - 0.01 * step for step in range(19)])
    assert series.relative_error == pytest.approx(np.sqrt((residual**2).mean() / (measured**2).mean()))


def test_step_time_ratio_is_of_medians(run):
    assert summarise(**run).step_time_ratio == 1.5


def test_a_document_without_a_value_is_an_error(run):
    with pytest.raises(ValueError, match="1 of 60 documents have no value for prose"):
        summarise(**run | {"values": run["values"].slice(1)})


def test_an_unknown_sample_is_an_error(run):
    documents = run["documents"] | {"id": run["documents"]["id"] + 1}
    with pytest.raises(ValueError, match="is not among the documents"):
        summarise(**run | {"documents": documents})


def test_page_stands_alone_and_is_well_formed(run, tmp_path):
    path = tmp_path / "deep" / "report.html"
    write_report(path, title="A <title>", settings={"rate <": "1e-3 & more"}, **run)
    text = path.read_text("utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "http" not in text.replace("http://www.w3.org/", "")
    assert "value = &minus;&phi;" in text
    assert "positive means the document lowered the validation loss" in text
    assert [label.split(" ")[0] for label in page.labels] == ["Value", "ROC", "Distributions", "Accumulated"]
    assert list(path.parent.iterdir()) == [path]


def test_everything_from_outside_is_escaped(run, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, title="A <title>", settings={"rate <": "1e-3 & more"}, **run)
    text = path.read_text("utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(" in text
    assert "A &lt;title&gt;" in text
    assert "rate &lt;" in text
    assert "1e-3 &amp; more" in text
    assert "<modules>" not in text
    assert "\x00" not in text


def test_page_shows_the_numbers(run, tmp_path):
    path = tmp_path / "report.html"
    summary = write_report(path, title="Run", settings={}, **run)
    text = path.read_text("utf-8")
    assert f"{summary.detection.auroc:.3f}" in text
    assert "1.50&times;" in text
    best = int(np.argmax(summary.mean_value))
    assert f"+{1e3 * summary.mean_value[best]:.2f} mnat" in text
    assert f"alert({best})" in text


def test_a_failed_write_leaves_the_old_page(run, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(path, title="Run", settings={}, **run)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
