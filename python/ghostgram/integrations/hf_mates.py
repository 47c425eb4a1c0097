"""MATES in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ghostgram.algorithms.mates.loop import StageLoop
from ghostgram.integrations.randomness import put_back, random_states

FILE = "mates.pt"


class MatesCallback(TrainerCallback):  # type: ignore[misc]
    """Lets the model that a Trainer trains choose its next data.

    The trainer's training set is the loop's `PlanDataset`. After every step the loop is told of it, and begins a stage
    when one is due: the Trainer itself waits and knows nothing of it. With every checkpoint goes a file `mates.pt`, and
    `trainer.train(resume_from_checkpoint=...)` goes on from it with the next document.

    Examples:
        >>> loop = StageLoop(PlanDataset(tokenize), pool, reference, task, "run/", every=1000,
        ...                  documents_per_step=64, docs=64_000)  # doctest: +SKIP
        >>> trainer = Trainer(model, args, train_dataset=loop.data, data_collator=collate)
        >>> MatesCallback(loop).attach(trainer)
        >>> trainer.train()

    Args:
        loop: The stages.
    """

    def __init__(self, loop: StageLoop) -> None:
        self.loop = loop
        self._random: list[dict[str, Any]] | None = None  # to be put back when the first step after a checkpoint begins

    def attach(self, trainer: Any) -> None:
        """Adds the callback to a trainer, before `trainer.train()`.

        Raises:
            ValueError: The trainer reads other data, or would read the loop's in a way in which documents are lost.
        """
        args, loop = trainer.args, self.loop
        if trainer.train_dataset is not loop.data:
            raise ValueError("trainer: expected train_dataset to be the loop's data, got another one")
        steps = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        for name, given, expected in (
            ("dataloader_num_workers", args.dataloader_num_workers, 0),  # workers could not be told of new plans
            ("dataloader_drop_last", args.dataloader_drop_last, False),
            ("ignore_data_skip", args.ignore_data_skip, True),  # the data itself knows where to go on
        ):
            if given != expected:
                raise ValueError(f"trainer.args.{name}: expected {expected} for a PlanDataset, got {given}")
        if loop.data.shared:  # the trainer does so too
            raise ValueError("data: expected PlanDataset(..., shared=False) for a Trainer, which shares documents out")
        if args.n_gpu > 1:
            raise ValueError("trainer: expected one GPU per process (torchrun), got DataParallel over several")
        if steps != loop.documents_per_step:
            raise ValueError(
                f"documents_per_step: expected {steps}, the trainer's batch over devices and accumulation, got "
                f"{loop.documents_per_step}"
            )
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes up the checkpoint that the Trainer resumes from, or begins."""
        if state.global_step:
            held = torch.load(Path(args.output_dir, f"checkpoint-{state.global_step}", FILE), weights_only=False)
            self.loop.load_state_dict(held["loop"])
            self._random = held["random"]
        self.loop.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Goes on with the checkpoint's random states, which a Trainer that skips no data leaves where they are."""
        if self._random is not None:
            put_back(self._random)
            self._random = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        """Tells the loop of an optimizer step."""
        self.loop.step_done(state.global_step, model, getattr(optimizer, "optimizer", optimizer))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Puts the loop's state beside the Trainer's checkpoint."""
        held = {"loop": self.loop.state_dict(state.global_step), "random": random_states()}
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            torch.save(held, folder / f"{FILE}.tmp")
            (folder / f"{FILE}.tmp").replace(folder / FILE)
