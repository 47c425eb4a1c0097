"""In-Run Data Shapley in Lightning's Trainer."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import copy
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostgram.algorithms.in_run_shapley import InRunShapley, RotatingPool
from ghostgram.integrations.lightning_callback import Callback

logger = logging.getLogger(__name__)


class InRunShapleyCallback(Callback):  # type: ignore[misc]
    """Values every sample of a run with automatic optimization while it runs.

    Accumulation, clipping by norm, precision plugins, schedules and validation between steps are the Trainer's own.
    Values are those that `InRunShapley` gives in a plain loop over the same batches. Checkpoints hold the engine's
    state; `trainer.fit(..., ckpt_path=...)` goes on from it, with every sample of every step in the log exactly once.
    They can be taken after a step only, not between two microbatches of one.

    Examples:
        >>> shapley = InRunShapleyCallback(lambda model: model.loss(held_out), log="values/")  # doctest: +SKIP
        >>> trainer = Trainer(callbacks=[shapley])  # a batch is a dict with integer ids under "id"
        >>> trainer.fit(model, loader)
        >>> values = shapley.engine.values()

    Args:
        validation: A callable LightningModule -> scalar loss, or a dict of them: see `InRunShapley`. It is called in
            the Trainer's precision.
        ids: batch -> (B,) integer ids of the samples.
        losses: (LightningModule, batch) -> (B,): every sample's share of the loss that `training_step` returns, as
            late="forward", fallback="jvp" and audits need it. None: `training_step` is run again where late="replay"
            needs its loss, with `self.log` silenced.
        log: A folder for the step log and the ledger; None keeps them in memory.
        **settings: What else `InRunShapley` takes (order, v_state, exclude, ...), less `resume`.

    Raises:
        TypeError: `resume` is given: whether a run goes on is the Trainer's to say.
    """

    def __init__(
        self,
        validation: Callable[[nn.Module], Tensor] | Mapping[str, Callable[[nn.Module], Tensor]],
        ids: Callable[[Any], Tensor | Sequence[int]] = itemgetter("id"),
        *,
        losses: Callable[[nn.Module, Any], Tensor] | None = None,
        log: str | Path | None = None,
        **settings: Any,
    ) -> None:
        if "resume" in settings:
            raise TypeError("resume: follows from trainer.fit(ckpt_path=...), it cannot be given")
        self._validation, self._ids, self._losses = validation, ids, losses
        self._settings = {"log": log, **settings}
        self._engine: InRunShapley | None = None
        self._restored: Mapping[str, Any] | None = None  # of a checkpoint, until training begins
        self._step: ExitStack | None = None  # the open step of several microbatches
        self._batch: ExitStack | None = None  # the open microbatch, until its backward is done
        self._last = False  # whether that one is the step's last
        self._patched = ExitStack()  # takes back what was set on the optimizer

    @property
    def engine(self) -> InRunShapley:
        """The engine of the run, also after it; there is one as soon as training has begun."""
        if self._engine is None:
            raise RuntimeError("InRunShapleyCallback.engine: training has not begun")
        return self._engine

    # The run ---------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the engine: optimizer and checkpoint are in place now.

        Raises:
            ValueError: Optimization is manual, or by more than one optimizer.
        """
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise ValueError("trainer: expected automatic optimization by one optimizer; use InRunShapley itself")
        state, self._restored = self._restored, None
        if state is None and trainer.global_step:
            logger.warning("the checkpoint holds no values: valuing starts at step %d", trainer.global_step)
        validation = self._validation
        inside: Any = (
            _in_precision(trainer, validation)
            if callable(validation)
            else {name: _in_precision(trainer, each) for name, each in validation.items()}
        )
        optimizer = trainer.optimizers[0]
        model = pl_module if trainer.world_size <= 1 else trainer.strategy.model  # which averages gradients
        self._engine = InRunShapley(model, optimizer, inside, resume=state is not None, **self._settings)
        if state is not None:
            self._engine.load_state_dict(state)
        _call_closures_first(optimizer, self._patched)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Opens the step, if it is its first microbatch, and the microbatch."""
        if self._batch is not None:  # on_train_batch_start of the module has skipped it
            self._drop()
        done = batch_idx + 1
        last = trainer.is_last_batch or done == trainer.num_training_batches
        self._last = last or done % trainer.accumulate_grad_batches == 0
        ids, again = self._ids(batch), partial(self._loss_again, trainer, pl_module, batch, batch_idx)
        self._batch = ExitStack()
        if self._last and self._step is None:
            self._batch.enter_context(self.engine.step(ids, again))
            return
        if self._step is None:
            self._step = ExitStack()
            self._step.enter_context(self.engine.step())
        self._batch.enter_context(self.engine.samples(ids, again))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Closes the microbatch, and the step after its last one: before anything unscales or clips."""
        batch, self._batch = self._batch, None
        assert batch is not None
        batch.close()
        if self._last and self._step is not None:
            step, self._step = self._step, None
            step.close()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Refuses a step whose last backward did not happen.

        Raises:
            RuntimeError: training_step returned None.
        """
        if self._batch is not None:
            raise RuntimeError("training_step returned None: a batch without a loss has no values; leave it out")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Drops the open step whole."""
        self._drop()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measures the last step and closes the log."""
        self._drop()
        self._patched.close()
        self.engine.close()

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return {} if self._engine is None else self._engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what a checkpoint holds, for when training begins."""
        self._restored = state_dict

    # A batch's loss again --------------------------------------------------------------------------------------------

    def _loss_again(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> Tensor:
        """What backward was called on: divided for accumulation, and scaled."""
        with trainer.precision_plugin.train_step_context(), ExitStack() as silenced:
            if self._losses is not None:
                loss = self._losses(module, batch)
            else:
                for name in ("log", "log_dict"):
                    setattr(module, name, lambda *_, **__: None)
                    silenced.callback(delattr, module, name)
                takes_index = len(inspect.signature(module.training_step).parameters) > 1
                found = module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)
                loss = found["loss"] if isinstance(found, Mapping) else found
        divided: Tensor = loss / trainer.accumulate_grad_batches
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            divided = scaler.scale(divided)
        return divided

    def _drop(self) -> None:
        """Leaves an open step as an exception would: the engine forgets it."""
        open_, self._batch, self._step = (self._batch, self._step), None, None
        for scope in open_:
            if scope is not None:
                with suppress(_DroppedError), scope:
                    raise _DroppedError


class _DroppedError(Exception):
    """A step was left before its last backward."""


def _in_precision(trainer: Any, validation: Any) -> Any:
    """The same validation set, evaluated as training_step is."""
    inside = partial(_evaluated, trainer, validation._loss if isinstance(validation, RotatingPool) else validation)
    if not isinstance(validation, RotatingPool):
        return inside
    pool = copy(validation)
    pool._loss = inside
    return pool


def _evaluated(trainer: Any, loss: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with trainer.precision_plugin.train_step_context():
        return loss(*arguments)


def _call_closures_first(optimizer: torch.optim.Optimizer, patched: ExitStack) -> None:
    """Makes `optimizer.step(closure)` call the closure before the step, and so before the step's hooks, not inside.

    Lightning runs forward, backward and clipping in that closure. For an optimizer that calls it once, at the
    beginning, as all that can be valued do, nothing else changes.
    """
    step, own = optimizer.step, vars(optimizer).get("step")

    @functools.wraps(step)
    def stepped(closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        if closure is None:
            return step(**options)
        with torch.enable_grad():
            loss = closure()
        step(**options)
        return loss

    optimizer.step = stepped  # type: ignore[method-assign]
    patched.callback(vars(optimizer).pop if own is None else vars(optimizer).__setitem__, "step", own)
