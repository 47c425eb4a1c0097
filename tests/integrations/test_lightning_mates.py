"""MATES in Lightning's Trainer: the plans it trains on, that an interrupted run is the same, and what is refused."""

import logging
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyarrow")
lightning = pytest.importorskip("lightning.pytorch", reason="no Lightning here: pip install 'ghostgram[lightning]'")
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from algorithms.mates.models import TASK, TinyLM, bytes_of, reference  # noqa: E402
from algorithms.mates.training import pool_of, write_pool  # noqa: E402
from algorithms.ranks import on_ranks  # noqa: E402
from ghostgram.algorithms.mates import PlanDataset, StageLoop  # noqa: E402
from ghostgram.integrations import randomness  # noqa: E402
from ghostgram.integrations.lightning_mates import MatesCallback  # noqa: E402
from integrations.runs import as_launched  # noqa: E402

STEPS, EVERY, BATCH = 9, 4, 4


class Module(lightning.LightningModule):
    """A small language model with dropout, whose rate falls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.dropout = TinyLM(width=16, layers=1, heads=2, context=24), nn.Dropout(0.1)

    def forward(self, ids):
        return self.dropout(self.net(ids))

    def training_step(self, batch):
        loss = TASK.losses(self, *batch).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def stages(folder, shared=False, **options):
    given = {
        "every": EVERY, "documents_per_step": 2 * BATCH, "docs": 48, "labels": 140, "backend": "exact", "clip": 1.0,
        "workers": 1, "progress": False,
    }  # fmt: skip
    pool = pool_of(folder / "pool") if (folder / "pool").exists() else write_pool(folder / "pool")
    return StageLoop(PlanDataset(str, shared=shared), pool, reference(), TASK, folder / "run", **given | options)


def fit(loop, *callbacks, module=None, data=None, batch=BATCH, ckpt_path=None, **settings):
    """Trains on the plans of a loop, two microbatches a step."""
    given = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_steps": STEPS,
        "enable_progress_bar": False, "enable_model_summary": False, "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
    } | settings  # fmt: skip
    module = module or Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers
        trainer = lightning.Trainer(callbacks=[MatesCallback(loop), *callbacks], **given)
        loader = DataLoader(data or loop.data, batch, collate_fn=bytes_of)
        torch.manual_seed(1)  # of dropout
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer, module


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    loop = stages(tmp_path_factory.mktemp("whole"))
    return loop, fit(loop)[1]


def test_every_stage_is_trained_on_for_its_steps(whole):
    loop, _ = whole
    assert loop.stage == 2
    # A batch that the trainer had read ahead when a stage began is the old plan's.
    assert [loop.ledger.consumed(stage) for stage in range(3)] == [36, 32, 4]
    assert sum(loop.data.position(STEPS * 2 * BATCH).values()) == STEPS * 2 * BATCH
    (rate,) = loop.selection.labels.manifest["settings"]["lrs"]
    assert rate == pytest.approx(3e-3 * (1 - 8 / (2 * STEPS)))  # of the step that comes next


class Cutting(Exception):
    pass


class Cut(lightning.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            raise Cutting


def test_a_run_that_was_cut_off_and_resumed_is_the_same(whole, tmp_path):
    """Dropout, the schedule and the ledger included."""
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(Cutting):
        fit(stages(tmp_path), Cut(), saver, enable_checkpointing=True)
    resumed = stages(tmp_path)
    _, module = fit(resumed, ckpt_path=tmp_path / "step=3.ckpt")
    assert resumed.selection.plan.table.equals(whole[0].selection.plan.table)
    assert [resumed.ledger.consumed(stage) for stage in range(3)] == [36, 32, 4]
    expected = whole[1].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


def test_another_fit_reads_what_was_read_ahead(tmp_path):
    loop = stages(tmp_path)
    seen = []
    loop.data.item = lambda text: seen.append(text) or text
    trainer, module = fit(loop, max_steps=2)
    assert len(seen) == 5 * BATCH
    trainer.fit_loop.epoch_loop.max_steps = 3
    trainer.fit(module, DataLoader(loop.data, BATCH, collate_fn=bytes_of))
    assert seen[5 * BATCH : 6 * BATCH] == seen[4 * BATCH : 5 * BATCH]
    assert trainer.global_step == 3


def train_on_a_rank(rank, folder):
    as_launched()
    loop = stages(folder, shared=True)
    read = []
    loop.data.item = lambda text: read.append(text) or text
    _, module = fit(loop, strategy="ddp", devices=2, batch=BATCH // 2, max_steps=6)
    with pytest.raises(ValueError, match="shared=True"):
        fit(stages(folder), strategy="ddp", devices=2, batch=BATCH // 2)
    return loop.selection.plan.table, read, {name: value.clone() for name, value in module.state_dict().items()}


def test_two_processes_train_on_one_plan_each_on_documents_of_its_own(tmp_path):
    write_pool(tmp_path / "pool")
    (plan, read, state), (other_plan, other_read, other_state) = on_ranks(2, train_on_a_rank, tmp_path)
    assert plan.equals(other_plan)
    assert all(torch.equal(value, other_state[name]) for name, value in state.items())
    together = [text for pair in zip(read, other_read, strict=True) for text in pair]
    assert len(together) == 6 * 2 * BATCH + BATCH  # and what was read ahead
    assert len(set(together)) == len(together)


class Manual(Module):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch": 3}, "documents_per_step: expected 6, .* got 8"),
        ({"accumulate_grad_batches": 1}, "documents_per_step: expected 4"),
        ({"limit_train_batches": 5}, "expected no limit_train_batches, got 5"),
        ({"data": ["a"] * 20}, "one DataLoader of the loop's data"),
        ({"module": Manual(), "accumulate_grad_batches": 1, "gradient_clip_val": None}, "automatic optimization"),
    ],
)
def test_a_trainer_that_would_lose_documents_is_refused(tmp_path, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        fit(stages(tmp_path), **settings)


def test_checkpoints_are_of_whole_steps_and_of_this_callback(tmp_path):
    class Between(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "between.ckpt")

    with pytest.raises(RuntimeError, match="between two microbatches of step 2"):
        fit(stages(tmp_path), Between())
    assert not (tmp_path / "between.ckpt").exists()
    bare = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1,
                             enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    bare.fit(Module(), DataLoader(["abcd"] * 4, BATCH, collate_fn=bytes_of))
    bare.save_checkpoint(tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match="taken with a MatesCallback"):
        fit(stages(tmp_path), ckpt_path=tmp_path / "bare.ckpt")


def test_random_states_of_other_processes_are_left_alone(caplog):
    states = randomness.random_states()
    torch.rand(3)
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        randomness.put_back(states * 2)
    assert "the checkpoint is of 2 processes, this run of 1" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)
    randomness.put_back(states)
    assert torch.equal(torch.get_rng_state(), states[0]["cpu"])
