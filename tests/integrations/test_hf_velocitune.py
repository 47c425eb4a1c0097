"""Velocitune in transformers' Trainer: the samples of a plain loop, and an interrupted run that is the same."""

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from algorithms.velocitune.tiny import BATCH, LENGTH, TOKENS, VOCABULARY, sampler, targets  # noqa: E402
from ghostgram.algorithms.velocitune.rules.odm import ODM  # noqa: E402
from ghostgram.algorithms.velocitune.rules.velocitune import Velocitune  # noqa: E402
from ghostgram.integrations.hf_velocitune import FILE, VelocituneCallback  # noqa: E402

STEPS, ACCUMULATION = 12, 2


def collate(rows):
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def job(folder, *, model=None, rule=None, sampled=None, **arguments):
    """A Trainer of a small GPT-2 with dropout, its sampler, and the ids of all batches that it fetches."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    made = transformers.GPT2LMHeadModel(config) if model is None else model
    given = {"tokens": TOKENS, "accumulation": ACCUMULATION, "collate_fn": collate} | (sampled or {})
    data = sampler(made, rule=Velocitune(targets(), "paper") if rule is None else rule, **given)
    fetched, received = [], data.received

    def noted(batch):
        fetched.append((batch.number, batch.micro, batch.domain_ids.tolist(), batch.sample_ids.tolist()))
        received(batch)

    data.received = noted
    arguments = {
        "per_device_train_batch_size": BATCH // ACCUMULATION, "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS, "save_steps": 5, "save_strategy": "steps", "learning_rate": 3e-2, "ignore_data_skip": True,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "seed": 0,
    } | arguments  # fmt: skip
    trainer = transformers.Trainer(made, transformers.TrainingArguments(str(folder / "out"), **arguments))
    return trainer, data, fetched


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer, data, fetched = job(tmp_path_factory.mktemp("whole"))
    VelocituneCallback(data).attach(trainer)
    trainer.train()
    return trainer, data, fetched


def test_the_trainer_reads_what_a_plain_loop_does(whole):
    _, data, fetched = whole
    assert [entry[:2] for entry in fetched] == [(step, micro) for step in range(STEPS) for micro in range(ACCUMULATION)]
    again = data.mixture.schedule.copy(STEPS - 1)
    assert [version.first for version in again.history] == [0, 4, 8]  # an update after every fourth step
    np.testing.assert_array_equal(data.controller.counts.draws, again.cursors)
    assert data.controller.l_init is not None
    drawn = [number for _, _, domains, _ in fetched for number in domains]
    np.testing.assert_array_equal(np.bincount(drawn), again.cursors)


def test_a_run_that_was_cut_off_and_resumed_is_the_same(whole, tmp_path):
    class Cut(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 9:
                raise KeyboardInterrupt

    trainer, data, first = job(tmp_path)
    VelocituneCallback(data).attach(trainer)
    trainer.add_callback(Cut())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "out/checkpoint-5" / FILE).exists()
    trainer, resumed, rest = job(tmp_path)
    VelocituneCallback(resumed).attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert first[: 5 * ACCUMULATION] + rest == whole[2]
    np.testing.assert_array_equal(resumed.weights, whole[1].weights)
    expected = whole[0].model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())


def test_the_run_ends_with_its_tokens(tmp_path):
    trainer, data, fetched = job(tmp_path, sampled={"tokens": 3 * BATCH * LENGTH}, save_strategy="no")
    VelocituneCallback(data).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(fetched) == 3 * ACCUMULATION
    assert data.spent


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"ignore_data_skip": False}, "ignore_data_skip: expected True"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps: expected 2"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers: expected 0"),
        ({"per_device_train_batch_size": 2}, "global_batch: expected 4"),
        ({"max_steps": -1, "num_train_epochs": 1}, "max_steps"),
    ],
)
def test_a_trainer_that_would_count_otherwise_is_refused(tmp_path, arguments, named):
    if "max_steps" in named:  # a Trainer itself refuses that without a training set
        trainer, data, _ = job(tmp_path)
        trainer.args.max_steps = -1
    else:
        trainer, data, _ = job(tmp_path, **arguments)
    with pytest.raises(ValueError, match=named):
        VelocituneCallback(data).attach(trainer)


def test_another_model_is_refused(tmp_path):
    trainer, _, _ = job(tmp_path)
    _, other, _ = job(tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.model"):
        VelocituneCallback(other).attach(trainer)


def test_a_rule_of_training_losses_is_refused_when_it_lacks_them(tmp_path):
    trainer, data, _ = job(tmp_path, rule=ODM(), save_strategy="no")
    VelocituneCallback(data).attach(trainer)
    with pytest.raises(ValueError, match="train_loss_sum: odm needs it"):
        trainer.train()
