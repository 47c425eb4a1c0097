"""Hashed n-grams against their definition, ridge against a dense solve, and bits that nothing but texts change."""

import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from algorithms.mates.planted import documents, influences
from ghostgram.algorithms.mates.influence.hashing import ngrams
from ghostgram.algorithms.mates.influence.model import fit
from ghostgram.algorithms.mates.influence.ngram import EmbeddingRidge, HashedNgramRidge
from ghostgram.algorithms.mates.influence.ridge import DenseRows, Moments, SparseRows
from ghostgram.algorithms.mates.stats import spearman

M, K, FULL = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 2**64 - 1


def mixed(word):
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & FULL
    word = (word ^ word >> 27) * 0x94D049BB133111EB & FULL
    return word ^ word >> 31


def hashed(word):
    return mixed(sum(mixed((byte + 1) * M & FULL) * M**j for j, byte in enumerate(word.encode().lower())) & FULL)


def expected_row(words, bits):
    ids = [hashed(word) for word in words]
    ids += [mixed((one * K + other) & FULL) for one, other in pairwise(ids)]
    counts = Counter(id >> (64 - bits) for id in ids)
    norm = np.sqrt(sum(np.log1p(count) ** 2 for count in counts.values()))
    row = np.zeros(2**bits + 1)
    for column, count in counts.items():
        row[column] = np.log1p(count) / norm
    row[-1] = (np.log1p(len(words)) - 5) / 2
    return row


def dense(rows):
    out = np.zeros((len(rows), rows.width))
    for i in range(len(rows)):
        entries = slice(rows.starts[i], rows.starts[i + 1])
        out[i, rows.columns[entries]] = rows.values[entries]
    return out


@pytest.mark.parametrize("bits", [5, 18])
def test_rows_are_the_hashed_counts_written_out(bits):
    texts = {
        "The cat saw the CAT, the cat": ["the", "cat", "saw", "the", "cat", ",", "the", "cat"],
        "": [],
        " \n\t": [],
        "x+=1; y_2 ()": ["x", "+=", "1", ";", "y_2", "()"],
        "café naïveté": ["café", "naïveté"],
        "“quoted” — don…t": ["“", "quoted", "”", "—", "don", "…", "t"],
        "中文 かなab": ["中", "文", "か", "な", "ab"],
        "мир🙂🙂": ["мир", "🙂", "🙂"],
    }
    rows = dense(ngrams(list(texts), bits))
    for row, words in zip(rows, texts.values(), strict=True):
        np.testing.assert_allclose(row, expected_row(words, bits), rtol=1e-6, atol=1e-7)


def test_a_row_depends_on_its_text_alone():
    texts = [*documents(50, 0)[0], "", "a" * 700_000, "é " * 200_000, "", "last"]
    together = ngrams(texts)
    weights = np.random.default_rng(0).normal(size=together.width).astype(np.float32)
    products = together.dot(weights)
    for i in (0, 7, 49, 50, 51, 52, 53, 54):
        alone = ngrams([texts[i]])
        entries = slice(together.starts[i], together.starts[i + 1])
        assert together.columns[entries].tobytes() == alone.columns.tobytes()
        assert together.values[entries].tobytes() == alone.values.tobytes()
        assert products[i] == alone.dot(weights)[0]


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_ridge_solves_the_centred_normal_equations_of_every_strength(kind):
    texts, _ = documents(120, 1)
    rows = ngrams(texts, 8)
    x, y = dense(rows), np.random.default_rng(1).normal(size=120) + 3
    strengths = (1e-2, 1.0, 1e2)
    solved = (rows if kind == "sparse" else DenseRows(x.astype(np.float32))).ridge(y, strengths, 500, 1e-10)
    centred = x - x.mean(0)
    for strength, weights, intercept in zip(strengths, solved.weights, solved.intercepts, strict=True):
        truth = np.linalg.solve(centred.T @ centred + strength * np.eye(x.shape[1]), centred.T @ (y - y.mean()))
        np.testing.assert_allclose(weights, truth, rtol=1e-5, atol=1e-6 * np.abs(truth).max())
        assert intercept == pytest.approx(y.mean() - x.mean(0) @ truth, rel=1e-5)
    assert solved.residual < 1e-9


def test_the_residual_reported_is_that_of_the_weakest_strength():
    rows, y = ngrams(documents(300, 2)[0]), np.random.default_rng(2).normal(size=300)
    found = rows.ridge(y, (1e-3, 1.0), 7, 1e-6)
    centre = rows.transposed_dot(np.full(300, 1 / 300))
    image = rows.dot(found.weights[0]) - centre @ found.weights[0]
    b = rows.transposed_dot(y - y.mean())
    left = b - rows.transposed_dot(image) + centre * image.sum() - 1e-3 * found.weights[0]
    assert found.iterations == 7
    assert found.residual == pytest.approx(np.linalg.norm(left) / np.linalg.norm(b), rel=1e-6)


def test_moments_of_parts_add_up():
    x, y = np.random.default_rng(3).normal(size=(90, 5)), np.random.default_rng(4).normal(size=90)
    whole, parts = Moments.of(x, y), Moments.of(x[:31], y[:31]) + Moments.of(x[31:], y[31:])
    np.testing.assert_allclose(parts.ridge([0.5]).weights, whole.ridge([0.5]).weights, rtol=1e-12)


def test_products_do_not_depend_on_where_blocks_end(monkeypatch):
    rows = ngrams(documents(40, 5)[0])
    weights = np.random.default_rng(5).normal(size=rows.width)
    whole = rows.dot(weights)
    monkeypatch.setattr("ghostgram.algorithms.mates.influence.ridge._ENTRIES", 100)
    assert rows.dot(weights).tobytes() == whole.tobytes()
    some = np.array([3, 3, 39, 0])
    assert rows[some].dot(weights).tobytes() == whole[some].tobytes()
    np.testing.assert_allclose(rows.transposed_dot(whole), dense(rows).T @ whole, rtol=1e-12)


def test_a_planted_linear_function_is_recovered():
    texts, ids = documents(3000, 6)
    model = fit(texts, influences(texts, 7), ids, ["planted"])
    assert model.report.spearman >= 0.95
    fresh, _ = documents(500, 6 + 1)
    # Fresh texts are of other topics, but of words of the same weights.
    assert spearman(model.score(fresh)[:, 0], influences(fresh, 7)[:, 0]) >= 0.85


def test_noise_does_not_pass_for_skill():
    texts, ids = documents(2000, 8)
    model = fit(texts, np.random.default_rng(8).normal(size=(2000, 1)), ids, ["noise"])
    head = model.report.heads[0]
    assert abs(head.spearman) < 0.25
    assert head.r2 < 0.1


BITS_OF_A_FIT = """
import sys
sys.path.insert(0, {tests!r})
from algorithms.mates.planted import documents, influences
from ghostgram.algorithms.mates.influence.model import fit
texts, ids = documents(600, 9)
print(fit(texts, influences(texts, 9, noise=0.5), ids, ["planted"]).digest)
"""


def test_the_bits_of_a_fit_depend_on_neither_threads_nor_order(request):
    texts, ids = documents(600, 9)
    labels = influences(texts, 9, noise=0.5)
    here = fit(texts, labels, ids, ["planted"]).digest
    order = np.random.default_rng(0).permutation(600)
    assert fit([texts[i] for i in order], labels[order], [ids[i] for i in order], ["planted"]).digest == here
    code = BITS_OF_A_FIT.format(tests=str(request.config.rootpath / "tests"))
    for threads in ("1", "2"):
        of = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        done = subprocess.run([sys.executable, "-c", code], env=of, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == here


def letters(texts):
    return [[text.count(letter) / (1 + len(text)) for letter in "abcdefghij klmnoprstu"] for text in texts]


def test_an_embedding_is_fitted_in_closed_form():
    texts, ids = documents(1500, 10)
    labels = np.array(letters(texts))[:, :1] * 2 - np.array(letters(texts))[:, 1:2]
    model = fit(texts, labels, ids, ["letters"], encoder=EmbeddingRidge(strengths=(1e-6, 1e-3), embed=letters))
    assert model.report.spearman > 0.999
    assert model.report.floor is not None
    assert model.report.floor[0] < model.report.spearman
    with pytest.raises(ValueError, match=r"embed: expected \(5, d\) finite numbers"):
        EmbeddingRidge(embed=lambda texts: [[np.nan]] * len(texts)).features(["a"] * 5)


def test_settings_and_unfitted_models_are_refused():
    with pytest.raises(ValueError, match="strengths: expected positive ascending"):
        HashedNgramRidge(strengths=(1.0, 0.1))
    with pytest.raises(ValueError, match="bits: expected 1 to 18, got 19"):
        HashedNgramRidge(bits=19).features(["a"])
    with pytest.raises(ValueError, match="expected a fitted model"):
        HashedNgramRidge().predict(["a"])
    assert HashedNgramRidge().features([]).dot(np.zeros(2**18 + 1)).shape == (0,)
    assert isinstance(HashedNgramRidge().features(["a"]), SparseRows)
