"""InRunShapley: watches a training loop and values every sample of every step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostgram.algorithms.in_run_shapley import log as logs
from ghostgram.algorithms.in_run_shapley.linearize import check_optimizer, linearize, state_is_ready
from ghostgram.algorithms.in_run_shapley.scaling import GradientRecord, gathered
from ghostgram.algorithms.in_run_shapley.validation import validation_gradients, validation_losses
from ghostgram.taps import Coverage, Taps, cover

Validation = Callable[[nn.Module], Tensor]
Directions = dict[nn.Parameter, Tensor]


@dataclass
class _Microbatch:
    ids: list[int]
    dots: dict[nn.Parameter, Tensor]
    late: list[Any]


@dataclass
class _Step:
    """One optimizer step, from its validation pass to the next one's."""

    number: int
    losses: Tensor  # (K,) float64, before the step
    gradients: list[dict[nn.Parameter, Tensor]]  # of the validation losses, one dict per set
    directions: Directions | None  # None: P is known only once the batch's gradient is
    history: Directions  # (K,) of every parameter that has one
    lrs: list[float]
    microbatches: list[_Microbatch] = field(default_factory=list)
    record: GradientRecord | None = None
    row: dict[str, Any] | None = None  # of the ledger, once the optimizer has stepped


class InRunShapley:
    """First-order In-Run Data Shapley in any training loop.

    For the optimizer's step `Delta = h + sum_i delta_i`, `delta_i = -P * g_i`, the value of sample i for validation
    set k is the Shapley value of the first-order utility,

        phi_ik = -<g_i, P * grad l_k(w)>,      value_ik = -phi_ik,

    so a *positive value means that the sample lowered the loss of set k*. `g_i` is the sample's share of the gradient
    the optimizer reads: its loss is used with the reduction it has, never rescaled, and clipping or a GradScaler
    between backward and step is observed. `P` is lr for SGD and `lr (1-b1)/(1-b1^t)/(sqrt(vhat)+eps)` for Adam and
    AdamW. Dots are taken in the layers' backward in the pass that computes the weight gradient; no per-sample
    gradient is stored. Training is what it would be without the engine, up to the summation order of weight gradients.

    Example:
        >>> shapley = InRunShapley(model, optimizer, {"novels": lambda m: loss(m, held_out)})  # doctest: +SKIP
        >>> for batch in loader:
        ...     with shapley.step(ids=batch["id"]):
        ...         loss(model, batch).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> values = shapley.values()

    Args:
        model: The model trained. The first dimension of every covered layer's input must be the sample.
        optimizer: torch.optim.SGD, Adam or AdamW over the model's parameters.
        validation: A callable model -> scalar loss, or a dict of them: K named validation sets.
        order: 1. (Order 2 is not available yet.)
        log: A folder for the step log and the ledger (Parquet); None keeps them in memory.
        v_state: Adam's second moment in P: "pre" as before the batch; "post" as after it, so that the linearised step
            is the real one, at the price of keeping every layer's (a, b) until the batch's gradient is complete.
            Adam's first step has no moment before the batch and always uses "post"; the log says which was used.
        exclude: Names or patterns of parameters left out of the scores; the ledger reports their joint effect.
        flush_every: Steps between two writes of the log.
        resume: Append to a log that already holds steps; their numbers and the ledger's cumulative residual go on after
            the last one written.

    Raises:
        UncoveredParameterError: A trainable parameter has no tap; it is named.
        TypeError: The optimizer's step is not of the form `h - P * G`.
        ImportError: pyarrow is missing.
        FileExistsError: The log folder already holds a run.

    Cost:
        Per step one forward and backward of each validation set; 2 B d p K FLOPs per matrix parameter beside the
        2 B T d p of its gradient; K + 1 parameter-sized arrays. `v_state="post"`: (a, b) of all layers as well.

    Source:
        arXiv 2406.11011, Theorem 3; the linearisation of Adam and the ledger are this library's
        (docs/algorithms/in_run_shapley.md).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        validation: Validation | Mapping[str, Validation],
        order: int = 1,
        log: str | Path | None = None,
        *,
        v_state: str = "pre",
        exclude: Sequence[str] = (),
        flush_every: int = 50,
        resume: bool = False,
    ) -> None:
        logs.require_pyarrow()
        check_optimizer(optimizer)
        if order != 1:
            raise ValueError(f"order: expected 1, got {order}; second order is not available yet")
        if v_state not in ("pre", "post"):
            raise ValueError(f"v_state: expected 'pre' or 'post', got {v_state!r}")
        if flush_every < 1:
            raise ValueError(f"flush_every: expected at least 1, got {flush_every}")
        if not callable(validation) and not validation:
            raise ValueError("validation: expected a callable or at least one named callable, got an empty mapping")
        self._model, self._optimizer, self._v_state, self._flush_every = model, optimizer, v_state, flush_every
        self._validation = {"validation": validation} if callable(validation) else dict(validation)
        self._groups = {p: g for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
        self._coverage = cover(model, self._groups, exclude)
        if not self._coverage.scored:
            raise ValueError(f"exclude: expected at least one trainable parameter left to score, got {exclude!r}")
        self._names = {p: n for n, p in (self._coverage.scored | self._coverage.excluded).items()}
        self._taps = Taps(self._coverage, list(self._coverage.scored.values()))
        metadata = {"reduction": "as in the training loss", "optimizer": type(optimizer).__name__,
                    "excluded": json.dumps(sorted(self._coverage.excluded))}  # fmt: skip
        folder = None if log is None else Path(log)
        self._steps = logs.PartedTable(
            logs.step_schema(list(self._validation), metadata), folder and folder / "steps", resume
        )
        self._ledger = logs.PartedTable(logs.ledger_schema(metadata), folder and folder / "ledger", resume)
        self._number = self._steps.next_step() - 1  # of the last step opened
        last = self._ledger.last_part()
        carried = dict(zip(last["set"].to_pylist(), last["cumulative_residual"].to_pylist(), strict=True))
        self._cumulative = torch.tensor([carried.get(name, 0.0) for name in self._validation], dtype=torch.float64)
        self._step: _Step | None = None
        self._inside = False
        self._hook = optimizer.register_step_pre_hook(lambda *_: self._before_optimizer())

    # The loop ----------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, ids: Tensor | Sequence[int] | None = None) -> Iterator[None]:
        """Scores the backward passes of one optimizer step; the optimizer's own step comes after the block.

        Args:
            ids: (B,) integer ids of the samples, in the order of the batch. None with gradient accumulation: each
                backward then goes into its own `with shapley.samples(ids)`.
        """
        if self._inside:
            raise RuntimeError("shapley.step() was entered twice: close one step before the next")
        opened = self._open_step()
        self._finish_step(opened.losses)
        self._step, self._inside = opened, True
        try:
            if ids is None:
                yield
            else:
                with self.samples(ids):
                    yield
            self._close_backward(opened)
        except BaseException:
            self._step = None  # a half-scored step is dropped whole
            raise
        finally:
            self._inside = False

    @contextmanager
    def samples(self, ids: Tensor | Sequence[int]) -> Iterator[None]:
        """Scores one microbatch of an open step: the backward inside belongs to these samples."""
        if not self._inside or self._step is None:
            raise RuntimeError("shapley.samples() was entered outside `with shapley.step()`")
        listed = _integers(ids)
        with self._taps.samples(len(listed), self._step.directions):
            yield
        self._step.microbatches.append(_Microbatch(listed, self._taps.dots(), self._taps.kept()))

    def values(self) -> Any:
        """The value of every sample so far: a pyarrow.Table with id, set, value (positive = helped), steps."""
        return logs.aggregate(self._steps.read(), list(self._validation))

    def step_log(self) -> Any:
        """Every scored sample of every step: a pyarrow.Table with the raw phi of each set (value = -phi)."""
        return self._steps.read()

    def ledger(self) -> Any:
        """Predicted and measured change of each validation loss, step by step: a pyarrow.Table.

        Closes the last step by measuring its validation losses, if the optimizer has taken it. A step that still waits
        for the optimizer stays open, and has no row yet.
        """
        if self._step is not None and self._step.row is not None:
            self._finish_step()
        return self._ledger.read()

    def coverage(self) -> Coverage:
        """Which layer covers each trainable parameter."""
        return self._coverage

    def close(self) -> None:
        """Finishes the last step, writes what is left of the log, and lets go of the optimizer."""
        self._finish_step()
        self._steps.flush()
        self._ledger.flush()
        self._hook.remove()

    # One step, phase by phase ------------------------------------------------------------------------------------

    def _open_step(self) -> _Step:
        losses, gradients = validation_gradients(self._model, self._validation, list(self._groups))
        self._number += 1
        early = self._v_state == "pre" and all(state_is_ready(self._optimizer, p) for p in self._groups)
        lrs = [float(g["lr"]) for g in self._optimizer.param_groups]
        step = _Step(self._number, losses, gradients, None, {}, lrs)
        if early:
            step.directions, step.history = self._linearised(gradients, None)
            step.gradients = []
        return step

    def _linearised(
        self, gradients: list[dict[nn.Parameter, Tensor]], scaled: Mapping[nn.Parameter, Tensor] | None
    ) -> tuple[Directions, Directions]:
        """D_k = P * grad l_k and the history <grad l_k, h> of every set, parameter by parameter."""
        directions: Directions = {}
        history: Directions = {}
        # Without a gradient in this step the optimizer will not touch a parameter.
        groups = {p: group for p, group in self._groups.items() if scaled is None or p in scaled}
        for group, parameters in _together(groups):
            grads = None if scaled is None else [scaled[p] for p in parameters]
            linearised = linearize(self._optimizer, group, parameters, grads)
            for p in parameters:
                wide = torch.float64 if p.dtype == torch.float64 else torch.float32
                directions[p] = torch.empty(len(gradients), *p.shape, dtype=wide, device=p.device)
            for k, gradient in enumerate(gradients):
                to = [directions[p][k] for p in parameters]
                torch._foreach_copy_(to, [gradient[p] for p in parameters])
                torch._foreach_mul_(to, [each.P for each in linearised])
            for p, (_, h) in zip(parameters, linearised, strict=True):
                if h is not None:
                    history[p] = torch.stack([_dot(gradient[p], h) for gradient in gradients])
        return directions, dict(zip(history, gathered(history.values()), strict=True))

    def _close_backward(self, step: _Step) -> None:
        """After the last backward of the step: what the gradients are before anything scales them."""
        if not step.microbatches:
            raise RuntimeError("no samples were scored in this step: pass ids to step(), or use samples(ids) inside it")
        step.record = GradientRecord(self._groups)
        if step.directions is not None:
            for microbatch in step.microbatches:
                microbatch.dots = _fetched(microbatch.dots)
            self._check_sums([m.dots for m in step.microbatches], step.directions, step.record, {})

    def _check_sums(
        self,
        dots: list[dict[nn.Parameter, Tensor]],
        directions: Directions,
        record: GradientRecord,
        scales: Mapping[nn.Parameter, float],
    ) -> None:
        """sum_i <g_i, D_w> = <G_w, D_w>, parameter by parameter: catches a use of a weight that no tap saw.

        `scales` says by how much .grad has been multiplied since backward.
        """
        checked = {p: p.grad for p in self._coverage.scored.values() if p.grad is not None and scales.get(p, 1.0)}
        if not checked:
            return
        expected = gathered(_dot(grad, d) for p, grad in checked.items() for d in directions[p]).view(len(checked), -1)
        sizes = gathered(torch._foreach_norm([d for p in checked for d in directions[p]])).view(len(checked), -1)
        expected /= expected.new_tensor([[scales.get(p, 1.0)] for p in checked])
        total = torch.zeros_like(expected)
        for taken in dots:
            if rows := [row for row, p in enumerate(checked) if p in taken]:
                total[rows] += torch.stack([taken[p] for p in checked if p in taken]).sum(1)
        norms = expected.new_tensor([record.norm(p) * (1e-2 if p in self._taps.rounded else 1e-4) for p in checked])
        wrong = ((total - expected).abs() > norms[:, None] * sizes).any(1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise RuntimeError(
                f"{self._names[list(checked)[row]]}: the samples' dots sum to {total[row].tolist()}, but the dot of the"
                f" gradient is {expected[row].tolist()}: some use of this parameter was not tapped (used outside its "
                "layer's forward, a backward outside shapley.step(), or a gradient left over from before the step)"
            )

    def _before_optimizer(self) -> None:
        """The optimizer is about to step: the scale of every gradient is known now, and so are the values."""
        step = self._step
        if self._inside:
            raise RuntimeError("optimizer.step() ran inside `with shapley.step()`: call it after the block")
        if step is None or step.record is None or step.row is not None:
            return
        lrs = [float(g["lr"]) for g in self._optimizer.param_groups]
        if lrs != step.lrs:
            raise RuntimeError(
                f"the learning rates changed from {step.lrs} to {lrs} between shapley.step() and optimizer.step()"
            )
        scales = step.record.scales(self._names)
        directions, v_state, dots = step.directions, "pre", [m.dots for m in step.microbatches]
        if directions is None:
            present = {p: p.grad for p in self._groups if p.grad is not None}
            directions, step.history = self._linearised(step.gradients, present)
            v_state, dots = "post", [_fetched(Taps.contract(m.late, directions)) for m in step.microbatches]
            self._check_sums(dots, directions, step.record, scales)
        factors = [torch.tensor([-scales.get(p, 1.0) for p in each], dtype=torch.float64) for each in dots]
        phis = [torch.tensordot(x, torch.stack(list(d.values())), 1) for x, d in zip(factors, dots, strict=True)]
        clip = min(scales.values(), default=1.0)
        self._log_samples(step, phis, clip, v_state, skipped=False)
        uncovered, history = torch.zeros_like(step.losses), torch.zeros_like(step.losses)
        for parameter, carried in step.history.items():
            if parameter.grad is not None:  # else the optimizer skips it: neither momentum nor decay move it
                history += carried
        left_out = [(p.grad, d) for p in self._coverage.excluded.values() if p.grad is not None for d in directions[p]]
        if left_out:
            uncovered -= gathered(_dot(grad, d) for grad, d in left_out).view(-1, len(uncovered)).sum(0)
        sum_phi = torch.stack([phi.sum(0) for phi in phis]).sum(0)
        step.row = {"sum_phi": sum_phi, "history": history, "uncovered": uncovered, "clip": clip,
                    "v_state": v_state, "skipped": False}  # fmt: skip
        step.directions, step.gradients, step.microbatches, step.record = None, [], [], None

    def _finish_step(self, after: Tensor | None = None) -> None:
        """Closes the last step with the validation losses after it (measured here unless the next step has done so).

        A step that the optimizer never took, as when a GradScaler skips one, moved nothing: its phi are logged as 0.
        """
        step, self._step = self._step, None
        if step is None:
            return
        if step.row is None:
            zeros = torch.zeros_like(step.losses)
            for_each = [torch.zeros(len(m.ids), len(zeros)) for m in step.microbatches]
            self._log_samples(step, for_each, 1.0, self._v_state, skipped=True)
            step.row = {"sum_phi": zeros, "history": zeros, "uncovered": zeros, "clip": 1.0, "v_state": self._v_state,
                        "skipped": True}  # fmt: skip
        self._log_ledger(step, validation_losses(self._model, self._validation) if after is None else after)
        if (step.number + 1) % self._flush_every == 0:
            self._steps.flush()
            self._ledger.flush()

    def _log_samples(self, step: _Step, phis: list[Tensor], clip: float, v_state: str, skipped: bool) -> None:
        for index, (microbatch, phi) in enumerate(zip(step.microbatches, phis, strict=True)):
            rows = len(microbatch.ids)
            columns: dict[str, Any] = {
                "step": [step.number] * rows, "sample_id": microbatch.ids, "microbatch": [index] * rows,
                "lr": [step.lrs[0]] * rows, "clip": [clip] * rows, "order": [1] * rows, "v_state": [v_state] * rows,
                "skipped": [skipped] * rows,
            }  # fmt: skip
            columns |= {f"phi_{name}": phi[:, k].tolist() for k, name in enumerate(self._validation)}
            self._steps.append(columns)

    def _log_ledger(self, step: _Step, after: Tensor) -> None:
        row = step.row
        assert row is not None
        measured = after - step.losses
        predicted = row["sum_phi"] + row["history"] + row["uncovered"]
        self._cumulative += measured - predicted
        sets = len(self._validation)
        # fmt: off
        self._ledger.append(
            {
                "step": [step.number] * sets, "set": list(self._validation), "l_before": step.losses.tolist(),
                "l_after": after.tolist(), "measured": measured.tolist(), "sum_phi": row["sum_phi"].tolist(),
                "history": row["history"].tolist(), "uncovered": row["uncovered"].tolist(),
                "predicted": predicted.tolist(), "residual": (measured - predicted).tolist(),
                "cumulative_residual": self._cumulative.tolist(), "lr": [step.lrs[0]] * sets,
                "clip": [row["clip"]] * sets, "g_val_age": [0] * sets, "order": [1] * sets,
                "v_state": [row["v_state"]] * sets, "skipped": [row["skipped"]] * sets,
            }
        )
        # fmt: on


def _integers(ids: Tensor | Sequence[int]) -> list[int]:
    listed = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not isinstance(listed, list) or not listed or not all(isinstance(i, int) for i in listed):
        raise ValueError(f"ids: expected a non-empty (B,) list or array of integers, got {ids!r}")
    return listed


def _together(groups: Mapping[nn.Parameter, dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[nn.Parameter]]]:
    """Parameters of one group, device and dtype, as many at a time as make good use of one call.

    On a GPU that is many, for every call has a price; on a CPU what a few take in cache, where they go through a dozen
    calls.
    """
    together: list[nn.Parameter] = []
    elements, kind = 0, None
    for parameter, group in groups.items():
        limit = 1 << (20 if parameter.device.type == "cpu" else 24)
        key = (id(group), parameter.device, parameter.dtype)
        if together and (key != kind or elements + parameter.numel() > limit):
            yield groups[together[0]], together
            together, elements = [], 0
        together.append(parameter)
        elements, kind = elements + parameter.numel(), key
    if together:
        yield groups[together[0]], together


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.flatten().to(y.dtype), y.flatten())


def _fetched(dots: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Dots (B, K) by parameter, on the CPU in float64."""
    return dict(zip(dots, gathered(dots.values()), strict=True))
