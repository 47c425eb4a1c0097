"""The demo from end to end on a few documents of made-up domains."""

import math
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from ghostgram import data  # noqa: E402


@pytest.fixture
def small_domains(monkeypatch):
    """Three of the demo's domains, of random letters; the others cannot be had."""
    generator = np.random.default_rng(0)
    letters = {"python_code": "abcd", "cpp_headers": "efgh", "shakespeare": "ijkl"}

    def load_text(name):
        if name not in letters:
            raise data.DomainUnavailable(f"{name}: the registry is closed")
        return ["".join(generator.choice(list(letters[name]), 1200)) for _ in range(20)]

    monkeypatch.setattr(data, "load_text", load_text)


def test_demo_values_every_document_and_writes_its_report(examples, small_domains, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        sys, "argv", ["in_run_shapley.py", "--out", str(tmp_path), "--documents", "66", "--epochs", "2"]
    )
    examples("in_run_shapley").main()
    printed = capsys.readouterr().out
    assert "going on without kjv: kjv: the registry is closed" in printed
    assert "corrupted documents found by low value, AUROC" in printed
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<strong>66</strong> training documents" in page
    assert "<strong>6</strong> steps" in page
    assert "7 corrupted among 66" in page


def test_gather_holds_documents_out_and_labels_every_window(examples, small_domains):
    demo = examples("in_run_shapley")
    corpus = demo.gather(90, "shuffle", seed=0, console=demo.Console(quiet=True))
    assert corpus.windows.shape == (90, demo.WINDOW)
    assert corpus.corrupted.sum() == 9
    alphabets = {"python_code": b"abcd", "cpp_headers": b"efgh", "shakespeare": b"ijkl"}
    assert all(set(w.tobytes()) <= set(alphabets[d]) for w, d in zip(corpus.windows, corpus.domain, strict=True))
    assert {name: tuple(held.shape) for name, held in corpus.validation.items()} == {
        "prose": (8, 192),
        "code": (8, 192),
    }
    clean = corpus.windows[~corpus.corrupted].tobytes()
    for held in corpus.validation.values():
        pieces = held.numpy().astype(np.uint8).reshape(-1, 16)
        assert not any(piece.tobytes() in clean for piece in pieces)


def test_gather_needs_three_domains(examples, small_domains, monkeypatch):
    demo = examples("in_run_shapley")
    monkeypatch.setattr(demo, "DOMAINS", ("python_code", "shakespeare", "kjv"))
    with pytest.raises(SystemExit, match="only 2 text domains can be had"):
        demo.gather(90, "shuffle", seed=0, console=demo.Console(quiet=True))


def test_tiny_lm_is_causal_and_starts_out_knowing_nothing(examples):
    tiny_lm = examples("tiny_lm")
    torch.manual_seed(0)
    model = tiny_lm.TinyLM(width=32, layers=2, heads=4, context=24)
    text = torch.randint(0, 256, (3, 24))
    changed = text.clone()
    changed[:, 15] = (text[:, 15] + 1) % 256
    before, after = model(text), model(changed)
    assert before.shape == (3, 24, 256)
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert (before[:, 15:] != after[:, 15:]).any(dim=-1).all()
    assert tiny_lm.next_byte_loss(model, text).item() == pytest.approx(math.log(256), abs=0.1)
