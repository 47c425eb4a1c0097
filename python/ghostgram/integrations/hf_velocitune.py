"""Velocitune in transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ghostgram.algorithms.velocitune import DomainSampler

FILE = "mixture_state.json"


class VelocituneCallback(TrainerCallback):  # type: ignore[misc]
    """Lets a Trainer train on a mixture whose weights follow the model.

    The Trainer reads the sampler's batches as they are: they are a rank's own already, so accelerate neither splits nor
    reads ahead of them. After every step the sampler is told of it, and evaluates and updates when it is time. With
    every checkpoint goes a file `mixture_state.json`, and `trainer.train(resume_from_checkpoint=True)` goes on from it
    with the next sample. The run ends at `max_steps`, or once the sampler's tokens are spent.

    Examples:
        >>> sampler = gg.velocitune(domains, model, held_out, "targets.json", tokens=10**9, global_batch=64,
        ...                         accumulation=4, collate_fn=collate)  # doctest: +SKIP
        >>> trainer = Trainer(model, TrainingArguments("out", max_steps=1000, ignore_data_skip=True, ...))
        >>> VelocituneCallback(sampler).attach(trainer)
        >>> trainer.train()

    Args:
        sampler: Made by `gg.velocitune`, with a `collate_fn` that gives the model's inputs.
    """

    def __init__(self, sampler: DomainSampler) -> None:
        self.sampler = sampler
        self._trainer: Any = None
        self._resumed: Path | None = None  # whose random states are to be taken up when its first step begins

    def attach(self, trainer: Any) -> None:
        """Adds the callback to a trainer, before `trainer.train()`.

        Raises:
            ValueError: The trainer would train on other batches than the sampler counts, or another model than it
                evaluates.
        """
        args, mixture = trainer.args, self.sampler.mixture
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        for name, given, expected in (
            ("ignore_data_skip", args.ignore_data_skip, True),  # the mixture itself knows where to go on
            ("gradient_accumulation_steps", args.gradient_accumulation_steps, mixture.accumulation),
            ("world_size", args.world_size, mixture.world),
            ("process_index", args.process_index, mixture.rank),
            ("dataloader_num_workers", args.dataloader_num_workers, 0),  # the sampler has workers of its own
        ):
            if given != expected:
                raise ValueError(f"trainer.args.{name}: expected {expected} for this sampler, got {given}")
        if args.max_steps <= 0:
            raise ValueError(
                f"trainer.args.max_steps: expected a number of steps, a mixture has no epochs, got {args.max_steps}"
            )
        if args.n_gpu > 1:
            raise ValueError("trainer: expected one GPU per process (torchrun), got DataParallel over several")
        if batch != mixture.schedule.current.batch:
            raise ValueError(
                f"global_batch: expected {batch}, the trainer's batch over devices and accumulation, got "
                f"{mixture.schedule.current.batch}"
            )
        if trainer.model is not self.sampler.model:
            raise ValueError("trainer.model: expected the model that the sampler evaluates, got another one")
        self._trainer = trainer
        trainer.get_train_dataloader = lambda: _Inputs(self.sampler)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes up the checkpoint that the Trainer resumes from, or evaluates the model as it begins.

        Raises:
            FileNotFoundError: The checkpoint has no state of the mixture.
        """
        if state.global_step:
            self._resumed = Path(args.output_dir, f"checkpoint-{state.global_step}")
            self.sampler.load(self._resumed / FILE)
        with self._trainer.compute_loss_context_manager():
            self.sampler.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Goes on with the checkpoint's random states, which a Trainer that skips no data leaves where they are."""
        if self._resumed is not None:
            self._trainer._load_rng_state(str(self._resumed))
            self._resumed = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tells the sampler of an optimizer step."""
        with self._trainer.compute_loss_context_manager():  # evaluation in the precision of training
            self.sampler.trained(state.global_step - 1)
        control.should_training_stop |= self.sampler.spent

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Puts the mixture's state beside the Trainer's checkpoint."""
        if state.is_world_process_zero:
            self.sampler.save(Path(args.output_dir, f"checkpoint-{state.global_step}", FILE))


class _Inputs:
    """What the Trainer iterates over: the model's inputs alone, the sampler being told of every batch fetched."""

    def __init__(self, sampler: DomainSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        for batch in self.sampler.loader():
            self.sampler.received(batch)
            yield batch.data
