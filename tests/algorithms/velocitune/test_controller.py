"""A mixture that is controlled: weights follow the rule, ranks agree, rows and states are those of one run."""

import json
import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from algorithms.ranks import on_ranks  # noqa: E402
from algorithms.velocitune.tiny import (  # noqa: E402  # noqa: E402
    BATCH,
    LENGTH,
    SIZES,
    TOKENS,
    TRAINING,
    model_and_optimizer,
    sampler,
    targets,
    train,
)
from ghostgram.algorithms.velocitune.controller import MixtureController  # noqa: E402
from ghostgram.algorithms.velocitune.evaluate import DomainLosses  # noqa: E402
from ghostgram.algorithms.velocitune.export import Mixture  # noqa: E402
from ghostgram.algorithms.velocitune.loader import DynamicMixture  # noqa: E402
from ghostgram.algorithms.velocitune.replay import replay  # noqa: E402
from ghostgram.algorithms.velocitune.rules.doremi import DoReMi  # noqa: E402
from ghostgram.algorithms.velocitune.rules.odm import ODM, ODMSettings  # noqa: E402
from ghostgram.algorithms.velocitune.rules.velocitune import Velocitune  # noqa: E402

NAMES = list(SIZES)


def losses(*values, se=0.01):
    return DomainLosses(np.array(values), np.full(3, se), np.full(3, 240), np.full(3, 16))


def controlled(rule=None, *, world=1, rank=0, interval=4 * BATCH * LENGTH, log=None, **options):
    """A controller and its mixture, with Velocitune's targets."""
    made = MixtureController(
        SIZES, Velocitune(targets(), "paper") if rule is None else rule, interval_tokens=interval, log=log, **options
    )
    return made, DynamicMixture(TRAINING, made, BATCH, rank=rank, world=world)


def stepped(ctl, mixture, batches, given):
    """Observes batches and updates when due; the batches after which it was."""
    loader, updates = iter(mixture.loader()), []
    for _ in range(batches):
        batch = next(loader)
        ctl.observe(batch.domain_ids, batch.tokens)
        if ctl.due(batch.number):
            updates.append((batch.number, ctl.update(given, after_batch=batch.number)))
    return updates


def test_weights_move_by_the_formula_and_reach_the_sampler():
    ctl, mixture = controlled()
    prior = np.array([40, 30, 20]) / 90
    updates = stepped(ctl, mixture, 9, losses(2.45, 2.15, 1.5))
    assert [number for number, _ in updates] == [3, 7]
    w = prior
    for _, update in updates:
        w = w * np.exp([(2.45 - 2.3) / 0.3, (2.15 - 2.0) / 0.6, 0.0])
        w /= w.sum()
        np.testing.assert_allclose(update.weights, w, atol=1e-14)
    assert [update.b_eff for _, update in updates] == [4, 8]
    history = mixture.schedule.history
    assert [version.first for version in history] == [0, 4, 8]
    np.testing.assert_allclose(history[-1].shares, w, atol=2**-29)
    # What was asked for: four batches of each of the first two weights, and one of the third.
    asked = sum(n * BATCH * v.shares for n, v in zip((4, 4, 1), history, strict=True))
    np.testing.assert_allclose(ctl.asked.draws, asked, atol=1e-12)
    np.testing.assert_allclose(ctl.mean_weights, asked / asked.sum(), atol=1e-14)
    np.testing.assert_array_equal(ctl.counts.draws, mixture.schedule.cursors)
    assert ctl.tokens == 9 * BATCH * LENGTH


def test_intervals_that_batches_do_not_divide_do_not_drift():
    ctl, mixture = controlled(interval=2.5 * BATCH * LENGTH)
    assert [number for number, _ in stepped(ctl, mixture, 20, losses(2.4, 2.1, 1.6))] == [2, 4, 7, 9, 12, 14, 17, 19]


def test_updates_take_effect_after_what_workers_have_in_hand():
    ctl, mixture = controlled()
    loader = iter(mixture.loader(num_workers=1, prefetch_factor=3))
    for _ in range(4):
        batch = next(loader)
        ctl.observe(batch.domain_ids, batch.tokens)
    assert ctl.due(3)
    assert ctl.update(losses(2.5, 2.1, 1.6), after_batch=3).b_eff == 3 + 1 + 3


def test_rows_say_what_happened(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    ctl, mixture = controlled(log=tmp_path / "log", parameters=1000)
    stepped(ctl, mixture, 8, losses(2.45, 2.15, 1.5))
    parts = sorted((tmp_path / "log").glob("*.parquet"))
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert [(row["update"], row["step"], row["domain"]) for row in rows] == [
        (update, step, name) for update, step in ((1, 4), (2, 8)) for name in NAMES
    ]
    code = rows[4]
    assert code["w_before"] == rows[1]["w_after"]
    assert code["V"] == pytest.approx(0.25, abs=1e-12)
    assert (code["loss"], code["se"], code["target"], code["l_init"]) == (2.15, 0.01, 2.0, 2.6)
    assert code["epochs"] == code["draws"] / 30
    assert code["tokens_seen"] == code["draws"] * LENGTH
    assert code["flops"] == 1000 * (6 * 8 * BATCH * LENGTH + 2 * 2 * 3 * 240)
    assert code["version"] == 1
    assert sum(row["realised"] for row in rows[3:]) == pytest.approx(1)
    assert abs(code["realised"] - code["requested"]) * 8 * BATCH <= 1
    settings = pq.read_table(parts[0]).schema.metadata
    assert settings[b"rule"].decode() == ctl.rule.describe()


def test_a_folder_with_another_runs_rows_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    ctl, mixture = controlled(log=tmp_path)
    stepped(ctl, mixture, 4, losses(2.5, 2.1, 1.6))
    again, mixture = controlled(log=tmp_path)
    with pytest.raises(FileExistsError, match="expected a new folder"):
        again.observe([0], [LENGTH])


def test_a_log_with_gaps_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    ctl, mixture = controlled(log=tmp_path)
    stepped(ctl, mixture, 8, losses(2.5, 2.1, 1.6))
    state, whole = ctl.state_dict(), mixture.state_dict()
    min(tmp_path.glob("part-*.parquet")).unlink()
    again, mixture = controlled(log=tmp_path)
    mixture.load_state_dict(whole)
    with pytest.raises(ValueError, match="6 rows of 2 updates of 3 domains, got 3"):
        again.load_state_dict(state)
    again, mixture = controlled(log=tmp_path / "new")
    mixture.load_state_dict(whole)
    again.load_state_dict(state)  # a log that begins here


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")

    def rows(folder):
        found = [row for part in sorted(folder.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
        return [{name: value for name, value in row.items() if name != "eval_seconds"} for row in found]

    whole_model, optimizer = model_and_optimizer()
    whole = sampler(whole_model, folder=tmp_path / "whole")
    ids, _ = train(whole_model, optimizer, whole)
    assert len(ids) == TOKENS // (BATCH * LENGTH)
    model, optimizer = model_and_optimizer()
    killed = sampler(model, folder=tmp_path / "killed")
    first, state = train(model, optimizer, killed, stop=9)
    weights, moments = [{k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()]
    moments = torch.load(_saved(moments, tmp_path / "optimizer.pt"))
    train(model, optimizer, killed, stop=15)  # goes on, writes another update, and is killed
    model, optimizer = model_and_optimizer()
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    resumed = sampler(model, folder=tmp_path / "killed")
    resumed.load_state_dict(json.loads(json.dumps(state)))
    rest, _ = train(model, optimizer, resumed)
    assert first + rest == ids
    np.testing.assert_array_equal(resumed.weights, whole.weights)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    for name, value in whole_model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def _saved(state, path):
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"domains": ["code", "prose", "maths"]}, "domains"),
        ({"domains": NAMES[:2]}, "domains"),
        ({"interval": 1.0}, "interval"),
        ({"sizes": [1.0, 2.0, 3.0]}, "sizes"),
    ],
)
def test_states_of_other_runs_are_refused(change, named):
    ctl, mixture = controlled()
    stepped(ctl, mixture, 4, losses(2.5, 2.1, 1.6))
    before = ctl.weights.copy()
    with pytest.raises(ValueError, match=f"expected the {named}"):
        ctl.load_state_dict(ctl.state_dict() | change)
    np.testing.assert_array_equal(ctl.weights, before)


def test_a_state_that_misses_samples_is_refused():
    ctl, _ = controlled()
    ctl.observe([0, 1], [LENGTH, LENGTH])
    with pytest.raises(ValueError, match="due"):
        ctl.state_dict()


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="interval_tokens: expected a positive number"):
        controlled(interval=None)
    with pytest.raises(ValueError, match="interval_tokens: expected None"):
        controlled(ODM())
    with pytest.raises(ValueError, match='mode: expected "loss"'):
        controlled(DoReMi(), interval=None)
    with pytest.raises(ValueError, match='mode: expected "sample"'):
        controlled(mode="loss")
    ctl = MixtureController(SIZES, Velocitune(targets(), "paper"), interval_tokens=1)
    with pytest.raises(ValueError, match="expected the domains"):
        DynamicMixture({name: TRAINING[name] for name in reversed(NAMES)}, ctl, BATCH)
    with pytest.raises(ValueError, match="expected the lengths"):
        DynamicMixture(TRAINING, ctl, BATCH, lengths=[1, 1, 2])
    with pytest.raises(RuntimeError, match="expected a DynamicMixture"):
        ctl.due(0)


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        ("proportional", [4 / 9, 3 / 9, 2 / 9]),
        ("uniform", [1 / 3] * 3),
        (2.0, np.sqrt([4, 3, 2]) / np.sqrt([4, 3, 2]).sum()),
        ([2, 1, 1], [0.5, 0.25, 0.25]),
    ],
)
def test_priors(prior, expected):
    ctl, mixture = controlled(prior=prior)
    np.testing.assert_allclose(ctl.weights, expected, atol=1e-15)
    np.testing.assert_allclose(mixture.schedule.current.weights, np.array(expected) * 2**30, atol=1)


@pytest.mark.parametrize("prior", ["even", -1.0, [1, 2], [0, 0, 0]])
def test_bad_priors(prior):
    with pytest.raises(ValueError, match="prior: expected"):
        controlled(prior=prior)


def test_shares_of_tokens_are_not_shares_of_samples():
    lengths = [10.0, 20.0, 40.0]
    ctl = MixtureController(SIZES, Velocitune(targets(), "paper"), interval_tokens=1e9, lengths=lengths)
    mixture = DynamicMixture(TRAINING, ctl, BATCH, lengths=lengths)
    np.testing.assert_allclose(ctl.weights, np.array([4, 6, 8]) / 18, atol=1e-15)
    np.testing.assert_allclose(np.array(mixture.schedule.current.weights) / 2**30, np.array([4, 3, 2]) / 9, atol=1e-8)
    loader = iter(mixture.loader())
    ctl.observe(next(loader).domain_ids)  # tokens by the mean lengths
    ctl.due(0)
    np.testing.assert_array_equal(ctl.counts.tokens, ctl.counts.draws * lengths)


def test_weights_of_losses_leave_the_sampler_alone():
    ctl, mixture = controlled(DoReMi("code"), interval=None, mode="loss")
    prior = ctl.weights.copy()
    for _, batch in zip(range(3), mixture.loader(), strict=False):
        ctl.observe(batch.domain_ids, batch.tokens)
        assert ctl.due(batch.number)
        moved = ctl.update(after_batch=batch.number, excess_sum=[8.0, 0, 0], excess_tokens=[16.0, 16, 16]).weights
    assert moved[0] > prior[0]
    np.testing.assert_array_equal(ctl.weights, prior)
    assert len(mixture.schedule.history) == 1
    v = moved / prior
    np.testing.assert_allclose(ctl.loss_weights, v / v.sum(), atol=1e-15)


def test_training_losses_are_those_since_the_last_update():
    ctl, mixture = controlled(ODM(ODMSettings(warmup=0)), interval=None)
    seen = []
    ctl.rule.propose = lambda observation, propose=ctl.rule.propose: seen.append(observation) or propose(observation)
    for _, batch in zip(range(2), mixture.loader(), strict=False):
        ctl.observe(batch.domain_ids, batch.tokens, torch.full((BATCH,), float(batch.number + 1), requires_grad=True))
        ctl.update(after_batch=batch.number)
        drawn = np.bincount(batch.domain_ids, minlength=3)
        np.testing.assert_array_equal(seen[-1]["train_loss_sum"], drawn * (batch.number + 1))
        np.testing.assert_array_equal(seen[-1]["train_tokens"], drawn * LENGTH)


def test_a_model_that_targets_were_not_made_for_is_warned_of(caplog):
    ctl, _ = controlled()
    ctl.begin(losses(2.6, 2.61, 2.59))
    assert not caplog.records
    ctl.begin(losses(2.6, 2.9, 2.6))
    assert ["code" in record.getMessage() for record in caplog.records] == [True]


def test_presets_are_told(caplog):
    with caplog.at_level(logging.INFO):
        controlled()
    assert "velocitune-paper" in caplog.text
    assert "eta = 1.0" in caplog.text


def test_exports_replay_and_come_back(tmp_path):
    ctl, mixture = controlled()
    drawn = []
    loader = iter(mixture.loader())
    for _ in range(10):
        batch = next(loader)
        drawn.append((batch.domain_ids.tolist(), batch.sample_ids.tolist()))
        ctl.observe(batch.domain_ids, batch.tokens)
        if ctl.due(batch.number):
            ctl.update(losses(2.5, 2.1, 1.6), after_batch=batch.number)
    made = ctl.export()
    made.save(tmp_path / "mixture.json")
    read = Mixture.load(tmp_path / "mixture.json")
    np.testing.assert_array_equal(read.final, ctl.weights)
    np.testing.assert_array_equal(read.mean, ctl.mean_weights)
    assert [stage["first_sequence"] for stage in read.stages] == [0, 4 * BATCH, 8 * BATCH]
    again = replay(read.run, "exact")
    assert again.batches == 10
    for domains, samples in drawn:
        slots = again.schedule.advance()
        assert (slots.domains.tolist(), again.schedule.samples(slots).tolist()) == (domains, samples)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Mixture\.save"):
        Mixture.load(tmp_path / "other.json")


def _controlled_on(rank, folder):
    import torch.distributed as dist

    ctl, mixture = controlled(rank=rank, world=dist.get_world_size(), log=folder / "log")
    updates = stepped(ctl, mixture, 9, losses(2.5, 2.1, 1.6))
    own = ctl.counts.state_dict(), [(number, update.weights.tolist(), update.b_eff) for number, update in updates]
    try:
        ctl.update(losses(2.5, 2.1, 1.6 + 0.1 * rank), after_batch=8)
        return own, ""
    except RuntimeError as error:
        return own, str(error)


def test_ranks_decide_alike_or_stop(tmp_path):
    ctl, mixture = controlled()
    updates = stepped(ctl, mixture, 9, losses(2.5, 2.1, 1.6))
    alone = ctl.counts.state_dict(), [(number, update.weights.tolist(), update.b_eff) for number, update in updates]
    for own, error in on_ranks(2, _controlled_on, tmp_path):
        assert own == alone
        assert error.startswith("weights: expected the same on every rank, got another one than rank 0's on ranks [1]")
