"""The public function: a stream of batches whose weights follow the model, in one loop."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ghostgram as gg  # noqa: E402
from algorithms.ranks import on_ranks  # noqa: E402
from algorithms.velocitune.tiny import (  # noqa: E402
    BATCH,
    HELD_OUT,
    LENGTH,
    TOKENS,
    TRAINING,
    model_and_optimizer,
    sampler,
    targets,
    train,
)
from ghostgram.algorithms.velocitune import evaluate_domains  # noqa: E402
from ghostgram.algorithms.velocitune.rules.doremi import DoReMi  # noqa: E402
from ghostgram.algorithms.velocitune.rules.odm import ODM, ODMSettings  # noqa: E402
from ghostgram.algorithms.velocitune.rules.static import Static  # noqa: E402


def test_weights_follow_the_losses_of_the_model(tmp_path):
    """The whole run again by its definition: losses of the model in training, velocities, exponentiated weights."""
    targets().save(tmp_path / "targets.json")
    model, optimizer = model_and_optimizer()
    data = gg.velocitune(
        TRAINING, model, HELD_OUT, tmp_path / "targets.json", tokens=TOKENS, global_batch=BATCH, interval=1 / 6,
        preset="paper",
    )  # fmt: skip
    w, expected, batches = np.array([4, 3, 2]) / 9, [], 0
    for batch in data:
        np.testing.assert_array_equal(data.weights, expected[-1] if expected else w)
        assert batch.data.shape == (BATCH, LENGTH)
        loss = torch.nn.functional.cross_entropy(model(batch.data)[:, :-1].transpose(1, 2), batch.data[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        batches += 1
        if batch.number % 4 == 3:
            losses = evaluate_domains(model, HELD_OUT).loss
            v = np.clip((losses - [2.3, 2.0, 1.5]) / (2.6 - np.array([2.3, 2.0, 1.5])), 0, 1)
            before = data.weights
            logits = np.log(before) + v
            expected.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
            following = [version.first for version in data.mixture.schedule.history]
            assert following == list(range(0, batch.number + 1, 4))
            data.state_dict()  # which counts the batch in hand as trained on
            np.testing.assert_allclose(data.weights, expected[-1], atol=1e-14)
            expected[-1] = data.weights
    assert batches == TOKENS // (BATCH * LENGTH)
    assert data.spent
    np.testing.assert_array_equal(data.weights, expected[-1])
    assert data.controller.ledger.flops["train"] == 6 * TOKENS
    assert data.controller.ledger.flops["evaluate"] == 2 * 7 * 3 * 16 * (LENGTH - 1)  # six, and one before


@pytest.mark.parametrize("workers", [0, 1])
def test_micro_batches_and_workers_change_nothing_but_the_lag(workers):
    def ids(**options):
        model, _ = model_and_optimizer()
        data = sampler(model, rule=Static(), tokens=6 * BATCH * LENGTH, **options)
        found = {}
        for batch in data:
            found.setdefault(batch.number, []).extend(
                zip(batch.domain_ids.tolist(), batch.sample_ids.tolist(), strict=True)
            )
        return [found[number] for number in sorted(found)]

    assert ids(accumulation=3, num_workers=workers) == ids()


def _ids_and_weights(rank=None, folder=None):
    """Of an untrained model, so that ranks and a single process see the same losses to the bit."""
    model, _ = model_and_optimizer()
    data = sampler(model, tokens=10 * BATCH * LENGTH, interval=0.25)
    ids = [list(zip(batch.domain_ids.tolist(), batch.sample_ids.tolist(), strict=True)) for batch in data]
    return ids, data.weights.tolist(), data.controller.tokens


def test_ranks_share_batches_and_evaluations(tmp_path):
    whole, weights, tokens = _ids_and_weights()
    assert weights != pytest.approx([4 / 9, 3 / 9, 2 / 9], abs=0.01)
    for rank, (ids, same, counted) in enumerate(on_ranks(2, _ids_and_weights, tmp_path)):
        assert ids == [batch[rank::2] for batch in whole]
        assert same == weights
        assert counted == tokens


def test_rules_of_training_losses_are_given_them():
    model, optimizer = model_and_optimizer()
    data = sampler(model, rule=ODM(ODMSettings(warmup=0)), tokens=4 * BATCH * LENGTH)
    train(model, optimizer, data)
    assert data.controller.rule.updates == 4
    assert data.controller.l_init is None  # a rule that reads no evaluation costs none
    assert len(data.mixture.schedule.history) == 2  # exploration keeps weights equal until t = 4
    forgotten = sampler(model, rule=ODM(ODMSettings(warmup=0)))
    with pytest.raises(ValueError, match="train_loss_sum: odm needs it"):
        for _ in forgotten:
            pass
    with pytest.raises(RuntimeError, match="expected a batch before"):
        sampler(model).report([0.0])


def test_a_loop_that_is_left_and_entered_again_misses_nothing():
    model, optimizer = model_and_optimizer()
    whole, _ = train(model, optimizer, sampler(model, rule=Static()))
    model, optimizer = model_and_optimizer()
    data = sampler(model, rule=Static())
    first, _ = train(model, optimizer, data, stop=6)
    rest, _ = train(model, optimizer, data)
    assert first + rest == whole


def test_a_left_batch_that_nobody_asked_the_state_of_is_counted_when_the_loop_goes_on():
    model, _ = model_and_optimizer()
    data = sampler(model, rule=Static())
    for batch in data:
        if batch.number == 2:
            break
    assert next(iter(data)).number == 3
    data.state_dict()
    assert data.controller.tokens == 4 * BATCH * LENGTH


def test_states_go_to_files_and_other_numbers_of_micro_batches(tmp_path):
    model, optimizer = model_and_optimizer()
    data = sampler(model, rule=Static())
    train(model, optimizer, data, stop=4)
    data.save(tmp_path / "state.json")
    other = sampler(model, rule=Static(), accumulation=2)
    other.load(tmp_path / "state.json")
    batch = next(iter(other))
    assert (batch.number, batch.micro) == (5, 0)
    assert json.loads((tmp_path / "state.json").read_text())["controller"]["domains"] == list(TRAINING)


def test_what_does_not_fit_is_refused(tmp_path):
    model, _ = model_and_optimizer()
    given = {"tokens": TOKENS, "global_batch": BATCH}
    with pytest.raises(ValueError, match="eval_sets: expected sequences of"):
        gg.velocitune(TRAINING, model, dict(reversed(HELD_OUT.items())), targets(), **given)
    with pytest.raises(ValueError, match="targets: expected them"):
        gg.velocitune(TRAINING, model, HELD_OUT, **given)
    with pytest.raises(ValueError, match="targets: expected None"):
        gg.velocitune(TRAINING, model, HELD_OUT, targets(), rule=Static(), **given)
    with pytest.raises(ValueError, match="interval"):
        gg.velocitune(TRAINING, model, HELD_OUT, targets(), interval=2, **given)
    with pytest.raises(ValueError, match='mode: expected "loss"'):
        gg.velocitune(TRAINING, model, HELD_OUT, rule=DoReMi(), **given)
    with pytest.raises(FileNotFoundError):
        gg.velocitune(TRAINING, model, HELD_OUT, tmp_path / "none.json", **given)
