"""Velocitune in Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from ghostgram.algorithms.velocitune import DomainSampler
from ghostgram.integrations.lightning_callback import Callback


class VelocituneCallback(Callback):  # type: ignore[misc]
    """Lets a LightningModule train on a mixture whose weights follow the model.

    `training_step` is given `MixtureBatch`es, whose `data` is what the sampler's `collate_fn` made. After every global
    batch the sampler is told of it, and evaluates and updates when it is time. Its state is part of the checkpoint.

    Examples:
        >>> sampler = gg.velocitune(domains, model, held_out, "targets.json", tokens=10**9, global_batch=64,
        ...                         lookahead=1)  # doctest: +SKIP
        >>> trainer = Trainer(callbacks=[VelocituneCallback(sampler)], max_steps=1000, use_distributed_sampler=False)
        >>> trainer.fit(module, sampler.loader())  # or trainer.fit(module, sampler.loader(), ckpt_path="last")

    Args:
        sampler: Made by `gg.velocitune` with `lookahead=1`: Lightning fetches a batch before it trains on the last one.
    """

    def __init__(self, sampler: DomainSampler) -> None:
        self.sampler = sampler

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Compares the trainer with the sampler.

        Raises:
            ValueError: They would count batches differently.
        """
        mixture = self.sampler.mixture
        for name, given, expected in (
            ("accumulate_grad_batches", trainer.accumulate_grad_batches, mixture.accumulation),
            ("world_size", trainer.world_size, mixture.world),
            ("global_rank", trainer.global_rank, mixture.rank),
        ):
            if given != expected:
                raise ValueError(f"trainer.{name}: expected {expected} for this sampler, got {given}")
        if mixture.lookahead < 1:
            raise ValueError(f"lookahead: expected 1, Lightning fetches a batch ahead, got {mixture.lookahead}")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Evaluates the model as it begins."""
        with trainer.precision_plugin.train_step_context():
            self.sampler.begin()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes a (micro-)batch."""
        self.sampler.received(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tells the sampler of a global batch that has been trained on whole."""
        if batch.micro == self.sampler.mixture.accumulation - 1:
            with trainer.precision_plugin.train_step_context():  # evaluation in the precision of training
                self.sampler.trained(batch.number)
            trainer.should_stop |= self.sampler.spent

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint; to be taken after a whole batch, not between two of its micro-batches."""
        return self.sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what a checkpoint holds."""
        self.sampler.load_state_dict(state_dict)
