"""In-Run Data Shapley in transformers' Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ghostgram.algorithms.in_run_shapley import InRunShapley

logger = logging.getLogger(__name__)


class InRunShapleyCallback(TrainerCallback):  # type: ignore[misc]
    """Values every sample of a Trainer's run while it runs.

    Accumulation, clipping, autocast, GradScaler, schedules, evaluation between steps and checkpoints are the Trainer's
    own: the callback only stands around each `training_step`. Values are those that `InRunShapley` gives in a plain
    loop over the same batches.

    Examples:
        >>> shapley = InRunShapleyCallback(lambda model: model(**held_out).loss, log="values/")  # doctest: +SKIP
        >>> trainer = Trainer(model, args, train_dataset=dataset)  # each sample has an integer "id"
        >>> shapley.attach(trainer)
        >>> trainer.train()
        >>> values = shapley.engine.values()

    With every checkpoint of the Trainer's goes a file `in_run_shapley.pt`; `trainer.train(resume_from_checkpoint=...)`
    goes on from it, with every sample of every step in the log exactly once.

    Args:
        validation: A callable model -> scalar loss, or a dict of them: see `InRunShapley`. Under bf16 or fp16 the model
            computes in autocast there too.
        ids: The column of the training set that holds the samples' integer ids. The callback takes it through the
            Trainer's removal of unused columns and past the data collator; the model does not see it.
        losses: (model, inputs, num_items_in_batch) -> (B,): every sample's share of what the Trainer's `compute_loss`
            gives for these inputs, as late="forward", fallback="jvp" and audits need it; `causal_lm_losses` for causal
            language models. None: the Trainer's own loss, which is all that late="replay" needs.
        log: A folder for the step log and the ledger; None keeps them in memory.
        **settings: What else `InRunShapley` takes (order, v_state, exclude, ...), less `resume`.

    Raises:
        TypeError: `resume` is given: whether a run goes on is the Trainer's to say.
    """

    def __init__(
        self,
        validation: Callable[[nn.Module], Tensor] | Mapping[str, Callable[[nn.Module], Tensor]],
        ids: str = "id",
        *,
        losses: Callable[[nn.Module, Any, Any], Tensor] | None = None,
        log: str | Path | None = None,
        **settings: Any,
    ) -> None:
        if "resume" in settings:
            raise TypeError("resume: follows from trainer.train(resume_from_checkpoint=...), it cannot be given")
        self._validation, self._ids, self._losses = validation, ids, losses
        self._settings = {"log": log, **settings}
        self._trainer: Any = None
        self._engine: InRunShapley | None = None
        self._checkpoint: Path | None = None  # which this call of train() resumes from
        self._scope: ExitStack | None = None  # the open step, between two of its microbatches

    @property
    def engine(self) -> InRunShapley:
        """The engine of the run, also after it; there is one as soon as training has begun."""
        if self._engine is None:
            raise RuntimeError("InRunShapleyCallback.engine: training has not begun")
        return self._engine

    def attach(self, trainer: Any) -> None:
        """Adds the callback to a trainer, which must not have it in `callbacks=`, before `trainer.train()`.

        No event surrounds a backward: clipping follows it before the next one. So the trainer's `training_step`,
        `get_train_dataloader` and `train` are wrapped, on this instance.

        Raises:
            ValueError: The trainer uses DataParallel or DeepSpeed, whose gradients no tap can follow.
            RuntimeError: The callback is attached already.
        """
        if self._trainer is not None:
            raise RuntimeError("InRunShapleyCallback.attach: it has a trainer already; make one callback for each")
        if trainer.args.n_gpu > 1:
            raise ValueError("trainer: expected one GPU per process (torchrun), got DataParallel over several")
        if trainer.is_deepspeed_enabled:
            raise ValueError("trainer: expected torch's own optimizer and backward, got DeepSpeed")
        self._trainer = trainer
        trainer.train = partial(self._trained, trainer.train)
        trainer.training_step = partial(self._scored, trainer.training_step)
        trainer.get_train_dataloader = partial(self._loader_with_ids, trainer.get_train_dataloader)
        trainer.add_callback(self)

    # Around the trainer's own methods --------------------------------------------------------------------------------

    def _trained(
        self, train: Callable[..., Any], resume_from_checkpoint: str | bool | None = None, *rest: Any, **named: Any
    ) -> Any:
        found = resume_from_checkpoint
        if found is True:
            found = get_last_checkpoint(self._trainer.args.output_dir)
        self._checkpoint = Path(found) if found else None
        return train(resume_from_checkpoint, *rest, **named)

    def _loader_with_ids(self, get_train_dataloader: Callable[[], Any]) -> Any:
        trainer = self._trainer
        trainer._set_signature_columns_if_needed()
        collate, columns = trainer.data_collator, trainer._signature_columns
        trainer.data_collator, trainer._signature_columns = _WithIds(collate, self._ids), [*columns, self._ids]
        try:
            return get_train_dataloader()
        finally:
            trainer.data_collator, trainer._signature_columns = collate, columns

    def _scored(
        self, training_step: Callable[..., Tensor], model: nn.Module, inputs: Any, *rest: Any, **named: Any
    ) -> Tensor:
        """One microbatch; the last one of a step closes the step, before the trainer clips."""
        if self._ids not in inputs:
            raise KeyError(f"ids: the batch has no {self._ids!r}, only {', '.join(inputs)}")
        ids, last = inputs.pop(self._ids), self._trainer.accelerator.sync_gradients
        again = partial(self._loss_again, training_step, inputs, *rest, **named)
        if last and self._scope is None:
            with self.engine.step(ids, again):
                return training_step(model, inputs, *rest, **named)
        if self._scope is None:
            self._scope = ExitStack()
            self._scope.enter_context(self.engine.step())
        scope, self._scope = self._scope, None
        with scope:
            with self.engine.samples(ids, again):
                loss = training_step(model, inputs, *rest, **named)
            if not last:
                self._scope = scope.pop_all()
        return loss

    def _loss_again(self, training_step: Callable[..., Tensor], inputs: Any, *rest: Any, **named: Any) -> Tensor:
        """What backward was called on: by the trainer's own code, up to that call."""
        trainer, accelerator = self._trainer, self._trainer.accelerator
        found: list[Tensor] = []
        with ExitStack() as replaced:
            accelerator.backward = lambda loss, **_: found.append(loss)
            replaced.callback(vars(accelerator).pop, "backward")
            if self._losses is not None:
                own = vars(trainer).get("compute_loss")
                trainer.compute_loss = self._shares
                replaced.callback(partial(_put_back, trainer, own))
            training_step(trainer.model, inputs, *rest, **named)
        loss: Tensor = found[0] / accelerator.gradient_accumulation_steps
        if accelerator.scaler is not None:
            loss = accelerator.scaler.scale(loss)
        return loss

    def _shares(self, model: nn.Module, inputs: Any, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Tensor:
        assert self._losses is not None
        return self._losses(model, inputs, num_items_in_batch)

    # The Trainer's events --------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Makes the engine: model, optimizer and checkpoint are in place now."""
        trainer = self._trainer
        if trainer is None:
            raise RuntimeError("InRunShapleyCallback: call attach(trainer), instead of giving it in callbacks=[...]")
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # out of accelerate's wrapper
        saved = None if self._checkpoint is None else self._checkpoint / _file_name(args)
        if saved is not None and not saved.exists():
            logger.warning("%s: no such file: valuing starts at step %d", saved, state.global_step)
            saved = None
        model = trainer.model if args.world_size <= 1 else trainer.model_wrapped  # which averages gradients
        self._engine = InRunShapley(model, optimizer, self._validation, resume=saved is not None, **self._settings)
        if saved is not None:
            self._engine.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Puts the engine's state beside the checkpoint that the Trainer has just written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        temporary = folder / f"{_file_name(args)}.tmp"
        torch.save(self.engine.state_dict(), temporary)
        temporary.replace(folder / _file_name(args))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measures the last step before the Trainer may load another step's weights."""
        if args.load_best_model_at_end:
            self.engine.ledger()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drops a step that was stopped between two microbatches, and closes the log."""
        scope, self._scope = self._scope, None
        if scope is not None:
            with suppress(_StoppedError), scope:
                raise _StoppedError
        self.engine.close()


def causal_lm_losses(model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
    """Every sample's share of a causal language model's loss, as transformers computes it from `labels`.

    out[i] = sum_t CE(logits[i, t], labels[i, t + 1]) / N, over labels other than -100; N is `num_items_in_batch`, the
    kept labels of the whole accumulated batch, or, where it is None, those of these inputs.

    Args:
        model: Gives `logits` (B, T, V).
        inputs: The model's inputs, with `labels` (B, T).
        num_items_in_batch: As the Trainer counts it.

    Returns:
        (B,) float32, whose sum is the loss.
    """
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits.float()
    labels = inputs["labels"][:, 1:]
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    shares: Tensor = each.view(labels.shape).sum(1) / count
    return shares


class _StoppedError(Exception):
    """Training ended inside a step."""


class _WithIds:
    """A data collator that takes the ids off the samples before the user's sees them, and puts them into its batch."""

    def __init__(self, collate: Callable[[list[Any]], Any], ids: str) -> None:
        self._collate, self._ids = collate, ids

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        if self._ids not in samples[0]:
            raise KeyError(
                f"ids: a training sample has no column {self._ids!r}, only {', '.join(samples[0])}; "
                f"dataset.add_column({self._ids!r}, range(len(dataset))) makes one"
            )
        batch = self._collate([{k: v for k, v in sample.items() if k != self._ids} for sample in samples])
        batch[self._ids] = torch.tensor([int(sample[self._ids]) for sample in samples])
        return batch


def _put_back(trainer: Any, compute_loss: Any) -> None:
    """`compute_loss` was an attribute of this trainer, or (None) its class's method."""
    del trainer.compute_loss
    if compute_loss is not None:
        trainer.compute_loss = compute_loss


def _file_name(args: Any) -> str:
    return "in_run_shapley.pt" if args.world_size <= 1 else f"in_run_shapley_{args.process_index}.pt"
