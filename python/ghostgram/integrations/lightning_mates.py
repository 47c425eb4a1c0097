"""MATES in Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from ghostgram.algorithms.mates.loop import StageLoop
from ghostgram.integrations.lightning_callback import Callback
from ghostgram.integrations.randomness import put_back, random_states

KEY = "ghostgram.mates"


class MatesCallback(Callback):  # type: ignore[misc]
    """Lets the model that a Trainer trains choose its next data.

    The Trainer reads a `DataLoader` of the loop's `PlanDataset`, which has no end: `max_steps` ends the run. After
    every step of the optimizer the loop is told of it, and begins a stage when one is due: the Trainer itself waits and
    knows nothing of it. Checkpoints hold the loop's state, and `trainer.fit(..., ckpt_path=...)` goes on with the next
    document. They can be taken after a step only, not between two microbatches of one. The Trainer reads a batch ahead,
    so a plan must hold one batch more than its stage trains on.

    Labels are taken of `LightningModule.forward`, or of what the task's `logits` calls.

    Examples:
        >>> loop = StageLoop(PlanDataset(tokenize), pool, reference, task, "run/", every=1000,
        ...                  documents_per_step=64, docs=65_000)  # doctest: +SKIP
        >>> trainer = Trainer(callbacks=[MatesCallback(loop)], max_steps=10_000)
        >>> trainer.fit(model, DataLoader(loop.data, batch_size=64, collate_fn=collate))

    Args:
        loop: The stages.
    """

    def __init__(self, loop: StageLoop) -> None:
        self.loop = loop
        self._step = 0  # the optimizer's steps that the loop has been told of
        self._within = False  # a step: some of its microbatches are done, and others not
        self._random: list[dict[str, Any]] | None = None  # of a checkpoint, until the first batch after it begins

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Takes up the checkpoint that training resumes from.

        Raises:
            ValueError: It was taken without this callback.
        """
        if trainer.state.fn == "fit":
            if KEY not in checkpoint:
                raise ValueError("ckpt_path: expected a checkpoint taken with a MatesCallback, got another one")
            self.loop.load_state_dict(checkpoint[KEY]["loop"])
            self._random = checkpoint[KEY]["random"]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Gives the data its first plan, unless there is one: the Trainer reads ahead before training begins."""
        self.loop.begin()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Looks at how the Trainer is set up.

        Raises:
            ValueError: Optimization is manual or by more than one optimizer; or the Trainer reads other data, or reads
                the loop's in a way in which documents are lost.
        """
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise ValueError("trainer: expected automatic optimization by one optimizer; use StageLoop itself")
        loader, data = trainer.train_dataloader, self.loop.data
        if not isinstance(loader, DataLoader) or loader.dataset is not data:
            raise ValueError("trainer: expected one DataLoader of the loop's data to train on, got something else")
        if trainer.limit_train_batches != 1.0:  # what is read ahead at the end of an epoch is never trained on
            raise ValueError(f"trainer: expected no limit_train_batches, got {trainer.limit_train_batches}")
        if trainer.world_size > 1 and not data.shared:
            raise ValueError(f"data: expected PlanDataset(..., shared=True) for {trainer.world_size} processes")
        documents = (loader.batch_size or 1) * trainer.accumulate_grad_batches * trainer.world_size
        if documents != self.loop.documents_per_step:
            raise ValueError(
                f"documents_per_step: expected {documents}, the batch over processes and accumulation, got "
                f"{self.loop.documents_per_step}"
            )
        self._step, self._within = trainer.global_step, False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Goes on with the checkpoint's random states, which the Trainer does not keep."""
        self._within = True
        if self._random is not None:
            put_back(self._random)
            self._random = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tells the loop of an optimizer step, when the batch was its last."""
        if trainer.global_step == self._step:
            return
        self._step, self._within = trainer.global_step, False
        model = pl_module if trainer.world_size <= 1 else trainer.strategy.model
        self.loop.step_done(self._step, model, trainer.optimizers[0])

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Puts the loop's state into a checkpoint.

        Raises:
            RuntimeError: The checkpoint is taken between two microbatches of one step.
        """
        if self._within:
            raise RuntimeError(
                f"a checkpoint between two microbatches of step {self._step + 1} cannot be gone on from: take it after "
                "a step"
            )
        checkpoint[KEY] = {"loop": self.loop.state_dict(self._step), "random": random_states()}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Enters what was trained on, and leaves the data there: another `fit` reads again what was read ahead."""
        self.loop.data.load_state_dict(self.loop.state_dict(self._step)["data"])
