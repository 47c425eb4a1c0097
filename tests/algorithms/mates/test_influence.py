"""Fits of labels: split, standardised, measured, started warm, saved; by the n-gram model, which is quick."""

import json

import numpy as np
import pytest

from algorithms.mates.planted import documents, influences
from ghostgram.algorithms.mates.influence.model import distil, fit, load
from ghostgram.algorithms.mates.influence.ngram import EmbeddingRidge, HashedNgramRidge
from ghostgram.algorithms.mates.influence.targets import prepare
from ghostgram.algorithms.mates.stats import bootstrap_interval, pearson, spearman, top_overlap

SMALL = HashedNgramRidge(bits=12)


def lengths(texts):
    return [[float(len(text)), float(text.count("a"))] for text in texts]


@pytest.fixture(scope="module")
def data():
    texts, ids = documents(1200, 20)
    labels = np.hstack([influences(texts, 20, noise=0.3), influences(texts, 21, noise=0.3, scale=1e-5, offset=-1)])
    return texts, labels, ids, ["near", "far"]


@pytest.fixture(scope="module")
def model(data):
    return fit(*data, encoder=SMALL)


def test_mean_and_std_are_of_the_training_split_and_restore_nats(data, model):
    texts, labels, ids, references = data
    labelled = prepare(texts, labels, ids, references)
    trained = np.array([ids.index(id) for id in labelled.train_ids])
    assert 0.87 < len(trained) / 1200 < 0.93
    np.testing.assert_allclose(model.mean, labels[trained].mean(0), rtol=1e-12)
    np.testing.assert_allclose(model.std, labels[trained].std(0), rtol=1e-12)
    np.testing.assert_allclose(labelled.train.targets * model.std + model.mean, labels[trained], rtol=1e-12)
    assert labelled.train.texts == [texts[i] for i in trained]
    z = model.score(texts[:9])
    assert z.dtype == np.float32
    np.testing.assert_allclose(model.influence(texts[:9]), model.mean + model.std * z, rtol=1e-12)
    # A label's own nats, and not the z-scores of it, come back: the second reference's are around -1, within 1e-5.
    np.testing.assert_allclose(model.influence(texts)[:, 1], labels[:, 1], atol=5e-5)


def test_the_report_measures_the_held_out_documents(data, model):
    texts, labels, ids, references = data
    held = {*range(1200)} - {ids.index(id) for id in prepare(texts, labels, ids, references).train_ids}
    held = np.array(sorted(held, key=lambda i: ids[i]))
    for r, head in enumerate(model.report.heads):
        ours = model.score([texts[i] for i in held])[:, r].astype(np.float64)
        truth = (labels[held, r] - model.mean[r]) / model.std[r]
        assert head.reference == references[r]
        assert head.spearman == spearman(ours, truth)
        assert (head.low, head.high) == bootstrap_interval(ours, truth)
        assert head.pearson == pytest.approx(pearson(ours, truth), abs=1e-12)
        assert head.mse == pytest.approx(np.mean((ours - truth) ** 2))
        assert head.r2 == pytest.approx(1 - head.mse / truth.var())
        assert head.overlap == top_overlap(ours, truth)
        assert (head.trained_on, head.measured_on) == (1200 - len(held), len(held))
        assert head.of_true_ranking is None
    assert model.report.spearman == pytest.approx(np.mean([head.spearman for head in model.report.heads]))
    assert model.report.floor is None
    rel = fit(*data, encoder=SMALL, reliability=0.81).report.heads[0]
    assert rel.of_true_ranking == pytest.approx(0.9 * rel.spearman)


def test_the_side_of_a_document_is_that_of_its_cluster_whatever_else_there_is(data):
    texts, labels, ids, references = data
    few = prepare(texts[:700], labels[:700], ids[:700], references)
    many = {*prepare(texts, labels, ids, references).train_ids}
    assert {*few.train_ids} == many & {*ids[:700]}
    clusters = [i // 3 if i % 2 else None for i in range(1200)]
    apart = {*prepare(texts, labels, ids, references, clusters).train_ids}
    for cluster in range(400):
        members = [ids[i] in apart for i in range(3 * cluster, 3 * cluster + 3) if i % 2]
        assert len({*members}) == 1
    alone = [id for id, cluster in zip(ids, clusters, strict=True) if cluster is None]
    assert {*alone} & apart == {*alone} & many


def test_missing_labels_are_left_out_of_their_reference_alone(data):
    texts, labels, ids, references = data
    holed = labels.copy()
    holed[np.random.default_rng(0).random(1200) < 0.5, 1] = np.nan
    model, whole = fit(texts, holed, ids, references, encoder=SMALL), fit(*data, encoder=SMALL)
    np.testing.assert_array_equal(model.score(texts)[:, 0], whole.score(texts)[:, 0])
    some = ~np.isnan(holed[:, 1])
    kept = [i for i in range(1200) if some[i]]
    alone = fit([texts[i] for i in kept], labels[kept, 1:], [ids[i] for i in kept], ["far"], encoder=SMALL)
    np.testing.assert_allclose(model.score(texts)[:, 1], alone.score(texts)[:, 0], atol=1e-6)
    assert model.report.heads[1].trained_on == alone.report.heads[0].trained_on


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"references": ["near", "near"]}, "references: expected distinct names"),
        ({"references": ["near", "sum"]}, "references: expected distinct names other than 'sum'"),
        ({"references": ["near"]}, r"labels: expected shape \(1200, 1\), got \(1200, 2\)"),
        ({"labels": lambda labels: labels * [1, 0]}, "labels: expected values that vary, got only .* 'far'"),
        (
            {"labels": lambda labels: np.where([False, True], np.inf, labels)},
            "labels: expected finite values or nan, got 1200 infinite",
        ),
        (
            {"labels": lambda labels: np.where(np.arange(1200)[:, None] < 20, labels, np.nan)},
            "at least 32 of ref.*near",
        ),
        ({"ids": lambda ids: ids[:-1]}, "ids: expected 1200, one for each text, got 1199"),
        ({"clusters": lambda _: [1]}, "clusters: expected 1200"),
        ({"held_out": 1.0}, r"held_out: expected a share in \(0, 1\), got 1.0"),
        ({"held_out": 0.001}, "at least 8 of reference 'near' held out"),
        ({"reliability": 1.2}, r"reliability: expected a number in \(0, 1\], got 1.2"),
        ({"best_of": True}, "best_of: expected a warm_start"),
    ],
)
def test_what_cannot_be_fitted_is_refused_by_name(data, change, says):
    given = dict(zip(("texts", "labels", "ids", "references"), data, strict=True)) | {"clusters": None}
    for name, value in change.items():
        given[name] = value(given.get(name)) if callable(value) else value
    with pytest.raises(ValueError, match=says):
        fit(**given)


def test_a_model_is_saved_whole_and_loaded_only_as_it_was(data, model, tmp_path):
    model.save(tmp_path / "model")
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.digest == model.digest
    assert loaded.report == model.report
    assert loaded.references == ("near", "far")
    np.testing.assert_array_equal(loaded.influence(data[0][:50]), model.influence(data[0][:50]))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    other = fit(*data, encoder=HashedNgramRidge(bits=11))
    assert other.digest != model.digest
    with pytest.raises(FileExistsError, match="another one's files"):
        other.save(tmp_path / "model")
    weights = np.load(tmp_path / "model/weights.npy")
    weights[5, 0] += 1e-3
    np.save(tmp_path / "model/weights.npy", weights)
    with pytest.raises(ValueError, match=f"expected an influence model of digest {model.digest}"):
        load(tmp_path / "model")
    np.save(tmp_path / "model/weights.npy", model.encoder.weights)
    about = json.loads((tmp_path / "model/model.json").read_text())
    (tmp_path / "model/model.json").write_text(json.dumps(about | {"std": [2 * s for s in about["std"]]}))
    with pytest.raises(ValueError, match="expected an influence model"):
        load(tmp_path / "model")


def test_an_embedding_is_saved_by_its_name(data, tmp_path):
    some = [part[:300] for part in data[:3]]
    model = fit(*some, data[3], encoder=EmbeddingRidge(embed=lengths))
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(load(tmp_path / "model").score(some[0]), model.score(some[0]))
    assert len(model.report.floor) == 2
    nameless = fit(*some, data[3], encoder=EmbeddingRidge(embed=lambda texts: lengths(texts)))
    with pytest.raises(ValueError, match="embed: expected a function that can be imported by name"):
        nameless.save(tmp_path / "nameless")
    assert not (tmp_path / "nameless").exists()


def test_a_warm_start_is_rebased_to_the_new_mean_and_std(data, model):
    texts, labels, ids, _ = data
    labelled = prepare(
        texts, np.hstack([labels[:, 1:] * 3 + 2, labels[:, :1] * 3, labels[:, :1]]), ids, ["far", "near", "new"]
    )
    rebased = model.rebased(labelled)
    nats = labelled.mean + labelled.std * rebased.predict(texts[:40])
    before = model.influence(texts[:40])
    np.testing.assert_allclose(nats[:, 0], before[:, 1], rtol=1e-8)
    np.testing.assert_allclose(nats[:, 1], before[:, 0], atol=1e-8)
    np.testing.assert_array_equal(rebased.predict(texts[:40])[:, 2], 0)


def test_few_drifted_labels_are_better_learnt_warm_and_never_much_worse():
    old, ids = documents(2500, 30)
    stage_1 = fit(old, influences(old, 30, noise=1.0), ids, ["r"], encoder=SMALL)
    gains = []
    for seed, drift in ((31, 0.0), (32, 0.5), (33, 1.0), (34, 3.0)):
        new, ids = documents(600, seed)
        drifted = influences(new, 30, noise=1.0) + drift * influences(new, seed)
        cold, warm, best = (
            fit(new, drifted, ids, ["r"], encoder=SMALL, held_out=0.2, **options)
            for options in ({}, {"warm_start": stage_1}, {"warm_start": stage_1, "best_of": True})
        )
        assert (cold.report.start, warm.report.start) == ("cold", "warm")
        better = max(best.report.tried, key=best.report.tried.get)
        assert (best.report.start, best.digest) == (better, {"warm": warm, "cold": cold}[better].digest)
        fresh, _ = documents(1000, seed + 100)
        truth = influences(fresh, 30)[:, 0] + drift * influences(fresh, seed)[:, 0]
        assert warm.score(new).mean() == pytest.approx(0, abs=0.1)  # the intercept has followed
        gains.append(spearman(warm.score(fresh)[:, 0], truth) - spearman(cold.score(fresh)[:, 0], truth))
    assert min(gains) > -0.02
    assert gains[0] > 0.05
    opposite = fit(new, -influences(new, 30), ids, ["r"], encoder=SMALL, warm_start=stage_1, best_of=True)
    assert opposite.report.start == max(opposite.report.tried, key=opposite.report.tried.get) == "cold"


def test_a_warm_start_of_another_kind_is_refused(data, model):
    with pytest.raises(ValueError, match="warm_start: expected a model of kind 'embedding', got 'ngram'"):
        fit(*data, encoder=EmbeddingRidge(embed=lengths), warm_start=model)


def test_auto_goes_on_with_the_model_there_is(data, model):
    assert fit(*data, warm_start=model).encoder.bits == SMALL.bits


def test_a_distilled_model_ranks_as_the_slower_one_does(data, model):
    fresh, ids = documents(1500, 40)
    quick = distil(model, fresh, ids, encoder=HashedNgramRidge(bits=14))
    assert quick.references == model.references
    assert quick.report.spearman > 0.95
    other, _ = documents(200, 41)
    np.testing.assert_allclose(quick.influence(other)[:, 0], model.influence(other)[:, 0], atol=1e-3)
