"""A small BERT fitted to influences: pooling by definition, exact resume, warm starts, files. All of it offline."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from algorithms.mates.planted import WORDS, documents, influences
from algorithms.mates.tiny_bert import bert, tokenizer
from ghostgram.algorithms.mates.influence import finetune
from ghostgram.algorithms.mates.influence.encoder import HFEncoder
from ghostgram.algorithms.mates.influence.finetune import Training
from ghostgram.algorithms.mates.influence.model import fit, load
from ghostgram.algorithms.mates.influence.pooling import in_batches, tokenised
from ghostgram.algorithms.mates.influence.targets import prepare
from ghostgram.algorithms.mates.stats import spearman

SETTINGS = {"chunk_len": 40, "batch": 32, "lr": 1e-2, "epochs": 3, "evaluations": 4, "device": "cpu"}


def encoder(**settings):
    return HFEncoder(bert(), tokenizer(), **SETTINGS | settings)


@pytest.fixture(scope="module")
def data():
    texts, ids = documents(500, 50, shortest=8, longest=30)
    labels = np.hstack([influences(texts, 50, noise=0.1), influences(texts, 51, noise=0.1, offset=-7)])
    return texts, labels, ids, ["one", "two"]


@pytest.fixture(scope="module")
def fitted(data):
    return fit(*data, encoder=encoder())


@pytest.fixture
def ragged():
    words = [
        " ".join(WORDS[i % 150] for i in range(start, start + n)) for start, n in enumerate((3, 38, 39, 76, 90, 1))
    ]
    return [*words, ""]


def test_a_text_is_cut_into_chunks_with_their_own_special_tokens(ragged):
    lengths = [[len(chunk) for chunk in document] for document in tokenised(tokenizer(), ragged, 2, 40)]
    assert lengths == [[5], [40], [40, 3], [40, 40], [40, 40], [3], [2]]
    (first, second) = tokenised(tokenizer(), ragged[2:3], 2, 40)[0]
    assert [*first[1:-1], *second[1:-1]] == [4 + i for i in range(2, 41)]
    assert {(chunk[0], chunk[-1]) for chunk in (first, second)} == {(1, 2)}


def test_embeddings_are_means_over_all_real_tokens_of_all_chunks(ragged):
    ours, model = encoder().embed(ragged), bert().eval()
    for text, mean in zip(ragged, ours, strict=True):
        words = [4 + WORDS.index(word) for word in text.split()]
        chunks = [[1, *words[i : i + 38], 2] for i in range(0, max(len(words), 1), 38)][:2]
        with torch.no_grad():
            states = torch.cat([model(torch.tensor([chunk])).last_hidden_state[0] for chunk in chunks])
        np.testing.assert_allclose(mean, states.mean(0), atol=1e-5)


def test_embeddings_do_not_depend_on_padding_batch_or_room_for_more_chunks(ragged):
    together = encoder().embed(ragged)
    alone = np.vstack([encoder().embed([text]) for text in ragged])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(encoder(tokens_at_once=1).embed(ragged), together, atol=1e-5)
    short = [text for text in ragged if len(text.split()) <= 38]
    whole = encoder(chunks=1).embed(short)
    for chunks in (2, 5):
        np.testing.assert_allclose(encoder(chunks=chunks).embed(short), whole, atol=1e-5)
    # A text in one chunk of 64 and in two of 40 is not the same to an encoder: attention ends at a chunk.
    assert np.abs(encoder(chunk_len=64, chunks=1).embed(ragged[2:3]) - together[2]).max() > 1e-3


def test_a_text_without_any_token_has_a_mean_of_nothing():
    bare = tokenizer()
    bare.backend_tokenizer.post_processor = None
    bare.post_processor = None
    model = HFEncoder(bert(), bare, **SETTINGS)
    if tokenised(bare, [""], 2, 40) != [[]]:
        pytest.skip("this version of transformers gives every text special tokens")
    rows = model.embed(["", WORDS[0]])
    assert not rows[0].any()
    assert rows[1].any()


def test_batches_hold_like_lengths_within_their_limit():
    documents = [[np.zeros(n, np.int32)] * k for n, k in np.random.default_rng(0).integers(1, [50, 3], (200, 2))]
    batches = list(in_batches(documents, 300))
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    size = [
        sum(len(documents[row]) for row in batch) * max(len(documents[row][0]) for row in batch) for batch in batches
    ]
    assert max(size) <= 300
    real = sum(len(chunk) for document in documents for chunk in document)
    assert sum(size) < 1.1 * real


def test_it_learns_what_the_words_are_worth(data, fitted):
    assert fitted.report.spearman > 0.7
    assert fitted.report.start == "cold"
    texts, _ = documents(300, 52, shortest=8, longest=30)
    for r, seed in enumerate((50, 51)):
        assert spearman(fitted.score(texts)[:, r], influences(texts, seed)[:, 0]) > 0.5
    evaluations = fitted.report.notes["evaluations"]
    assert [row["step"] for row in evaluations][:8] == [4, 8, 12, 15, 19, 23, 27, 30]
    best = max(evaluations, key=lambda row: row["spearman"])
    assert best["step"] == fitted.report.notes["kept_step"]
    assert best["spearman"] == pytest.approx(fitted.report.spearman, abs=1e-6)
    nats = fitted.influence(texts)
    np.testing.assert_allclose((nats - fitted.mean) / fitted.std, fitted.score(texts), atol=1e-4)


def test_gradients_are_of_the_mean_over_the_labels_there_are_however_they_are_batched(data):
    texts, labels, ids, references = data
    holed = labels.copy()
    holed[np.random.default_rng(1).random(labels.shape) < 0.4] = np.nan
    quiet = {"dropout": 0.0, "epochs": 1, "weight_decay": 0.0}

    def weights(**settings):
        still = bert()
        for part in still.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        model = fit(texts, holed, ids, references, encoder=HFEncoder(still, tokenizer(), **SETTINGS | quiet | settings))
        return model.encoder.net.state_dict(), model

    (one, model), (other, _) = weights(), weights(tokens_at_once=200)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-3, rtol=0.0)
    assert [head.trained_on for head in model.report.heads] != [len(texts)] * 2
    assert np.isfinite(model.score(texts)).all()


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [5, 20, 41])
def test_a_killed_fit_goes_on_to_the_very_weights_of_one_that_was_not(data, fitted, tmp_path, monkeypatch, at):
    steps = []
    train = Training._train

    def counted(self):
        steps.append(self.step)
        if len(steps) == at:
            raise Killed
        train(self)

    monkeypatch.setattr(Training, "_train", counted)
    lasting = encoder(checkpoint_seconds=0.0)
    with pytest.raises(Killed):
        fit(*data, encoder=lasting, folder=tmp_path)
    torch.manual_seed(at)
    resumed = fit(*data, encoder=lasting, folder=tmp_path)
    assert steps[at] == max(row["step"] for row in fitted.report.notes["evaluations"] if row["step"] < at)
    after = torch.get_rng_state()
    torch.manual_seed(at)
    assert torch.equal(after, torch.get_rng_state())
    assert resumed.encoder.digest() == fitted.encoder.digest()
    assert resumed.report == fitted.report
    again = fit(*data, encoder=lasting, folder=tmp_path)
    assert again.digest == resumed.digest
    total = fitted.report.notes["steps"]
    assert len(steps) == at + total - steps[at]
    # Of other labels the checkpoint is none.
    assert fit(data[0], -data[1], *data[2:], encoder=lasting, folder=tmp_path).digest != resumed.digest
    assert len(steps) == at + total - steps[at] + total


def test_a_warm_start_says_the_same_nats_and_keeps_what_was_learnt(data, fitted):
    texts, labels, ids, _ = data
    few = 120
    drifted = labels[:few, ::-1] * 2 + 3
    references = ["two", "one"]
    still = fit(texts[:few], drifted, ids[:few], references, warm_start=fitted, encoder=encoder(lr=1e-12, epochs=1))
    assert still.report.start == "warm"
    before = fitted.influence(texts)[:, ::-1]
    np.testing.assert_allclose(still.influence(texts), before, atol=1e-5 * np.abs(before).max())
    assert still.report.notes["evaluations"][0]["step"] == 0
    cold = fit(texts[:few], drifted, ids[:few], references, encoder=encoder())
    warm = fit(texts[:few], drifted, ids[:few], references, encoder=encoder(), warm_start=fitted)
    assert warm.report.spearman > cold.report.spearman - 0.02
    assert fitted.encoder.net.head.bias.shape == (2,)


def test_it_is_saved_as_transformers_does_and_loads_to_the_same_scores(data, fitted, tmp_path):
    fitted.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.digest == fitted.digest
    np.testing.assert_array_equal(loaded.score(data[0][:40]), fitted.score(data[0][:40]))
    with pytest.raises(ValueError, match="expected one with a name or a model to start cold from"):
        fit(*data, warm_start=loaded, best_of=True)
    # Its folder is a checkpoint of transformers.
    named = HFEncoder(str(tmp_path / "model/encoder"), **SETTINGS)
    np.testing.assert_array_equal(named.embed(data[0][:9]), fitted.encoder.embed(data[0][:9]))
    torch.save({"weight": torch.zeros(2, 32), "bias": torch.zeros(2)}, tmp_path / "model/encoder/../head.pt")
    with pytest.raises(ValueError, match="expected an influence model of digest"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"chunks": 0}, "chunks: expected at least 1, got 0"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"dtype": "float16"}, "dtype: expected 'float32' or 'bfloat16', got 'float16'"),
    ],
)
def test_settings_are_refused_by_name(settings, says):
    with pytest.raises(ValueError, match=says):
        encoder(**settings)


def test_what_an_encoder_cannot_take_is_refused(data):
    with pytest.raises(TypeError, match="tokenizer: expected one beside a model object"):
        HFEncoder(bert())
    with pytest.raises(TypeError, match="tokenizer: expected a fast tokenizer, got object"):
        HFEncoder(bert(), object())
    with pytest.raises(ValueError, match="chunk_len: expected at most the encoder's 64 positions, got 65"):
        fit(*data, encoder=encoder(chunk_len=65))
    with pytest.raises(ValueError, match="HFEncoder: expected a fitted model"):
        encoder().predict(["a"])
    assert encoder().embed([]).shape == (0, 32)


def test_rates_fall_linearly_and_matrices_alone_decay(data, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def recorded(optimizer):
        groups = optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
        assert {p.ndim for p in groups[0]["params"]} == {2}
        assert {p.ndim for p in groups[1]["params"]} == {1}
        assert torch.cat([p.grad.ravel() for group in groups for p in group["params"]]).norm() < 1 + 1e-5
        rates.append([group["lr"] for group in groups])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    some = [part[:120] for part in data[:3]]
    fit(*some, data[3], encoder=encoder(epochs=2, evaluations=1))
    assert rates == [pytest.approx([1e-2 * (1 - k / 8)] * 2) for k in range(8)]


def test_the_weights_of_the_best_evaluation_are_kept(data, monkeypatch):
    predictions = []

    def second_is_best(predicted, targets):
        predictions.append(predicted)
        return np.array([0.9 if len(predictions) == 2 else 0.1])

    monkeypatch.setattr(finetune, "rank_agreement", second_is_best)
    some = [part[:120] for part in data[:3]]
    model = fit(*some, data[3], encoder=encoder(epochs=1))
    held_out = prepare(*some, data[3]).held_out.texts
    assert model.report.notes["kept_step"] == 2
    assert len(predictions) == 4
    np.testing.assert_allclose(model.score(held_out), predictions[1], atol=1e-6)
    assert np.abs(predictions[3] - predictions[1]).max() > 1e-3


def test_training_that_diverges_is_an_error(data):
    with pytest.raises(FloatingPointError, match="lr: expected finite predictions, got others at step"):
        fit(*data, encoder=encoder(lr=1e30))


def test_bfloat16_is_near_float32_and_not_the_same(ragged):
    exact, rounded = encoder().embed(ragged), encoder(dtype="bfloat16").embed(ragged)
    assert rounded.dtype == np.float32
    assert 1e-5 < np.abs(rounded - exact).max() < 0.05
