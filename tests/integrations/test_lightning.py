"""The Lightning callback gives the values of a plain loop over the same batches, and leaves training alone."""

import contextlib
import copy
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyarrow")
lightning = pytest.importorskip("lightning.pytorch", reason="no Lightning here: pip install 'ghostgram[lightning]'")
from torch import nn  # noqa: E402

import ghostgram as gg  # noqa: E402
from algorithms.models import Small, mse, regression  # noqa: E402
from algorithms.ranks import on_ranks  # noqa: E402
from ghostgram.integrations.lightning import InRunShapleyCallback  # noqa: E402
from integrations.runs import as_launched, assert_same_values, together  # noqa: E402

SAMPLES, BATCH, STEPS, LR, MAX_NORM = 20, 4, 6, 0.02, 0.4
HELD_OUT = regression(7, 2, torch.float32)
OPTIMIZERS = {"sgd": lambda p: torch.optim.SGD(p, LR, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, LR)}


def batches():
    """5 of 4 samples: the last step of an epoch has one microbatch."""
    x, y = regression(SAMPLES, 1, torch.float32)
    return [{"id": 100 + ids, "x": x[ids], "y": y[ids]} for ids in torch.arange(SAMPLES).split(BATCH)]


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))


class Module(lightning.LightningModule):
    """A small regression; it logs, validates and dresses its loss as many do."""

    def __init__(self, optimizer="adamw"):
        super().__init__()
        self.net, self.optimizer = Small(torch.float32), optimizer

    def training_step(self, batch, batch_idx):
        loss = mse(self.net, (batch["x"], batch["y"]))
        self.log("loss", loss)
        return {"loss": loss}

    def validation_step(self, batch):
        self.log("held out", mse(self.net, HELD_OUT))

    def configure_optimizers(self):
        optimizer = OPTIMIZERS[self.optimizer](self.net.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}


def validation(module):
    return mse(module.net if isinstance(module, Module) else module, HELD_OUT)


def shares(module, batch):
    return (module.net(batch["x"]) - batch["y"]) ** 2 / len(batch["y"])


def fit(module, *callbacks, ckpt_path=None, rows=slice(None), **settings):
    """Trains on some rows of every batch."""
    given = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 2,
        "enable_progress_bar": False, "enable_model_summary": False, "accumulate_grad_batches": 2,
        "gradient_clip_val": MAX_NORM, "num_sanity_val_steps": 1, "val_check_interval": 1,
    } | settings  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers and batches
        mine = [{name: column[rows] for name, column in batch.items()} for batch in batches()]
        trainer = lightning.Trainer(callbacks=list(callbacks), **given)
        loaders = [torch.utils.data.DataLoader(each, batch_size=None) for each in (mine, mine[:1])]
        trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return trainer


def plain_loop(net, optimizer="adamw", precision="32-true", accumulate=2, **settings):
    """The same run, written out; dots that come late are taken as the callback lets them be."""
    settings = {"late": "stored" if accumulate == 1 else "replay"} | settings
    bf16 = precision == "bf16-mixed"
    autocast = lambda: torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()  # noqa: E731

    def loss(batch):
        with autocast():
            return mse(net, (batch["x"], batch["y"])) / accumulate

    def held_out(net):
        with autocast():
            return validation(net)

    optimizer = OPTIMIZERS[optimizer](net.parameters())
    rates = schedule(optimizer)
    shapley = gg.InRunShapley(net, optimizer, held_out, **settings)
    for _ in range(2):
        every = batches()
        for start in range(0, len(every), accumulate):
            with shapley.step():
                for batch in every[start : start + accumulate]:
                    with shapley.samples(batch["id"], lambda batch=batch: loss(batch)):
                        loss(batch).backward()
            nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
    shapley.close()
    return shapley


@pytest.mark.parametrize(
    ("settings", "optimizer", "accumulate", "precision"),
    [
        ({}, "sgd", 1, "32-true"),
        ({}, "sgd", 2, "32-true"),
        ({"v_state": "post"}, "adamw", 2, "32-true"),
        ({"order": 2}, "adamw", 1, "32-true"),
        ({"order": 2}, "adamw", 2, "32-true"),
        ({}, "sgd", 2, "bf16-mixed"),
        ({"order": 2}, "adamw", 1, "bf16-mixed"),
    ],
)
def test_values_are_those_of_a_plain_loop(settings, optimizer, accumulate, precision):
    """With clipping, a schedule, validation between steps, and a last step of one microbatch."""
    module, untouched = Module(optimizer), Module(optimizer)
    twin = copy.deepcopy(module.net)
    shapley = InRunShapleyCallback(validation, **settings)
    fit(module, shapley, precision=precision, accumulate_grad_batches=accumulate)
    assert 0 < min(shapley.engine.step_log()["clip"].to_pylist()) < 1
    assert_same_values(shapley.engine, plain_loop(twin, optimizer, precision, accumulate, **settings))
    fit(untouched, precision=precision, accumulate_grad_batches=accumulate)
    for p, q in zip(module.parameters(), untouched.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5 if precision == "32-true" else 1e-2)


def train_on_a_rank(rank, _folder):
    as_launched()
    shapley = InRunShapleyCallback(validation, order=2)
    rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    fit(Module(), shapley, rows=rows, strategy="ddp", devices=2, use_distributed_sampler=False)
    return shapley.engine.step_log(), shapley.engine.ledger()


def test_two_processes_find_what_one_finds(tmp_path):
    """Under DistributedDataParallel, accumulated."""
    found = together(on_ranks(2, train_on_a_rank, tmp_path))
    assert_same_values(found, plain_loop(Module().net, order=2))


def test_shares_of_the_loss_serve_forward_mode_and_audits():
    module = Module()
    twin = copy.deepcopy(module.net)
    shapley = InRunShapleyCallback(validation, losses=shares, order=2, late="forward", audit_every=1)
    fit(module, shapley)
    assert max(shapley.engine.ledger()["audit"].to_pylist()) < 1e-4
    assert_same_values(shapley.engine, plain_loop(twin, order=2), tolerance=1e-4)


def test_a_rotating_pool_keeps_turning():
    seen = []

    def loss(module, indices):
        seen.append(tuple(indices.tolist()))
        return mse(module.net, [part[indices] for part in HELD_OUT])

    fit(Module("sgd"), InRunShapleyCallback(gg.RotatingPool(loss, size=7, take=2)))
    assert len(set(seen)) > 3


def test_goes_on_from_a_checkpoint_with_every_step_once(tmp_path):
    whole = InRunShapleyCallback(validation, log=tmp_path / "whole")
    fit(Module("sgd"), whole)
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=True)
    stopped = InRunShapleyCallback(validation, log=tmp_path / "stopped", flush_every=1)
    fit(Module("sgd"), stopped, saver, enable_checkpointing=True, max_steps=5)
    assert set(stopped.engine.step_log()["step"].to_pylist()) == set(range(5))
    resumed = InRunShapleyCallback(validation, log=tmp_path / "stopped")
    fit(Module("sgd"), resumed, ckpt_path=tmp_path / "step=3.ckpt")
    assert_same_values(resumed.engine, whole.engine)


def test_a_checkpoint_without_values_is_said_aloud(tmp_path, caplog):
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(Module("sgd"), saver, enable_checkpointing=True, max_epochs=1)
    shapley = InRunShapleyCallback(validation)
    fit(Module("sgd"), shapley, ckpt_path=tmp_path / "step=3.ckpt")
    assert "the checkpoint holds no values: valuing starts at step 3" in caplog.text
    assert set(shapley.engine.step_log()["step"].to_pylist()) == {0, 1, 2}


class Skipping(Module):
    """Ends its first epoch between two microbatches of the second step."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch == 0 and batch_idx == 3 else None


def test_a_step_that_is_left_half_way_is_dropped():
    shapley = InRunShapleyCallback(validation)
    fit(Skipping("sgd"), shapley, gradient_clip_val=None)
    log = shapley.engine.step_log()
    first = log["sample_id"].to_pylist()[:8]
    assert first == list(range(100, 108))
    assert len(log) == 8 + SAMPLES  # the first step of the first epoch, and the whole second one


def test_the_optimizer_is_left_as_it_was():
    module = Module()
    trainer = fit(module, InRunShapleyCallback(validation))
    assert "ghostgram" not in trainer.optimizers[0].step.__code__.co_filename


class Silent(Module):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class Manual(Module):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "error", "complaint"),
    [(Silent, RuntimeError, "training_step returned None"), (Manual, ValueError, "expected automatic optimization")],
)
def test_what_cannot_be_valued_is_refused(module, error, complaint):
    kept = {"gradient_clip_val": None, "accumulate_grad_batches": 1} if module is Manual else {}
    with pytest.raises(error, match=complaint):
        fit(module("sgd"), InRunShapleyCallback(validation), **kept)


def test_without_training_there_is_no_engine():
    with pytest.raises(TypeError, match="resume"):
        InRunShapleyCallback(validation, resume=True)
    with pytest.raises(RuntimeError, match="training has not begun"):
        _ = InRunShapleyCallback(validation).engine
