"""MATES in transformers' Trainer: the plans it trains on, and that an interrupted run is the same."""

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from algorithms.mates.models import bytes_of, reference  # noqa: E402
from algorithms.mates.training import write_pool  # noqa: E402
from ghostgram.algorithms.mates import PlanDataset, StageLoop, Task  # noqa: E402
from ghostgram.integrations.hf_mates import FILE, MatesCallback  # noqa: E402

STEPS, EVERY, BATCH = 9, 4, 4


def collate(texts):
    ids, mask = bytes_of(texts)
    return {"input_ids": ids, "labels": ids.masked_fill(~mask, -100)}


def job(folder, steps=STEPS, **arguments):
    """A Trainer of a small GPT-2 on the plans of a loop, and the loop."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=256, n_positions=24, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    loop = StageLoop(
        PlanDataset(str), write_pool(folder / "pool"), reference(), Task(bytes_of), folder / "run",
        every=EVERY, documents_per_step=2 * BATCH, docs=48, labels=140, backend="exact", clip=1.0, workers=1,
        progress=False,
    )  # fmt: skip
    given = {
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 2, "max_steps": steps, "save_steps": 3,
        "learning_rate": 3e-3, "ignore_data_skip": True, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "steps", "logging_strategy": "no", "seed": 0, "remove_unused_columns": False,
    }  # fmt: skip
    args = transformers.TrainingArguments(str(folder / "out"), **given | arguments)
    return transformers.Trainer(model, args, train_dataset=loop.data, data_collator=collate), loop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer, loop = job(folder)
    MatesCallback(loop).attach(trainer)
    trainer.train()
    return trainer, loop


def test_every_stage_is_trained_on_for_its_steps(whole):
    _, loop = whole
    assert loop.stage == 2
    # A batch that the trainer had read ahead when a stage began is the old plan's.
    assert [loop.ledger.consumed(stage) for stage in range(3)] == [36, 32, 4]
    assert sum(loop.data.position(STEPS * 2 * BATCH).values()) == STEPS * 2 * BATCH


def test_a_run_that_was_cut_off_and_resumed_is_the_same(whole, tmp_path):
    trainer, loop = job(tmp_path)

    class Cut(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                raise KeyboardInterrupt

    MatesCallback(loop).attach(trainer)
    trainer.add_callback(Cut())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert Path(tmp_path, "out/checkpoint-3", FILE).exists()
    trainer, resumed = job(tmp_path)
    MatesCallback(resumed).attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert resumed.selection.plan.table.equals(whole[1].selection.plan.table)
    expected = whole[0].model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dataloader_num_workers": 1}, "dataloader_num_workers: expected 0"),
        ({"ignore_data_skip": False}, "ignore_data_skip: expected True"),
        ({"per_device_train_batch_size": 3}, "documents_per_step: expected 6"),
    ],
)
def test_a_trainer_that_would_lose_documents_is_refused(tmp_path, arguments, named):
    trainer, loop = job(tmp_path, **arguments)
    with pytest.raises(ValueError, match=named):
        MatesCallback(loop).attach(trainer)


def test_other_data_is_refused_and_data_that_would_be_shared_out_twice(tmp_path):
    trainer, loop = job(tmp_path)
    loop.data.shared = True
    with pytest.raises(ValueError, match="shared=False"):
        MatesCallback(loop).attach(trainer)
    trainer.train_dataset = [1, 2]
    with pytest.raises(ValueError, match="train_dataset"):
        MatesCallback(loop).attach(trainer)
