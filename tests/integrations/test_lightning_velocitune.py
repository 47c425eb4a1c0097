"""Velocitune in Lightning's Trainer: the samples of a plain loop, and an interrupted run that is the same."""

import numpy as np
import pytest
import torch

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
except ModuleNotFoundError:
    pytest.skip("needs lightning", allow_module_level=True)

from algorithms.velocitune.tiny import BATCH, LENGTH, TOKENS, Pairs, sampler, sequence_losses
from ghostgram.integrations.lightning_velocitune import VelocituneCallback

ACCUMULATION = 2


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.seen = Pairs(), []

    def training_step(self, batch):
        self.seen.append((batch.number, batch.micro, batch.domain_ids.tolist(), batch.sample_ids.tolist()))
        return sequence_losses(self.model, batch.data).mean() / LENGTH

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-2)


def fit(folder, steps, resume=None, **options):
    """A fit of so many steps, a checkpoint at its end."""
    module = Module()
    data = sampler(module.model, accumulation=ACCUMULATION, **({"lookahead": 1} | options))
    kept = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=steps)
    trainer = Trainer(
        max_steps=steps, accumulate_grad_batches=ACCUMULATION, callbacks=[VelocituneCallback(data), kept], logger=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data.loader(), ckpt_path=resume)
    return module, data, kept.best_model_path


def test_a_run_that_was_cut_off_and_resumed_is_the_same(tmp_path):
    whole, data, _ = fit(tmp_path / "whole", 14)
    # Decided after batches 3, 7 and 11; one more batch is in Lightning's hands then.
    assert [version.first for version in data.mixture.schedule.history] == [0, 5, 9, 13]
    first, _, path = fit(tmp_path / "first", 6)
    rest, resumed, _ = fit(tmp_path / "rest", 14, path)
    assert first.seen + rest.seen == whole.seen
    assert [entry[:2] for entry in whole.seen] == [(step, micro) for step in range(14) for micro in range(ACCUMULATION)]
    np.testing.assert_array_equal(resumed.weights, data.weights)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in rest.state_dict().items())


def test_the_run_ends_with_its_tokens(tmp_path):
    module, data, _ = fit(tmp_path, 10, tokens=3 * BATCH * LENGTH)
    assert data.spent
    assert len(module.seen) == 3 * ACCUMULATION


def test_a_sampler_that_expects_no_reading_ahead_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lookahead: expected 1"):
        fit(tmp_path, 2, lookahead=0)


def test_other_accumulation_is_refused(tmp_path):
    module = Module()
    data = sampler(module.model, lookahead=1, tokens=TOKENS)
    trainer = Trainer(
        max_steps=1, accumulate_grad_batches=3, callbacks=[VelocituneCallback(data)], logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches: expected 1"):
        trainer.fit(module, data.loader())
