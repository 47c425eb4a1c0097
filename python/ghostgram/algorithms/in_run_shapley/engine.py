"""InRunShapley: watches a training loop and values every sample of every step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostgram.algorithms.in_run_shapley import log as logs
from ghostgram.algorithms.in_run_shapley.microbatch import Losses
from ghostgram.algorithms.in_run_shapley.scoring import Scorer, Step
from ghostgram.algorithms.in_run_shapley.select import (
    Choose,
    Chosen,
    OnlineSelection,
    Request,
    StepCurvature,
    chooser,
)
from ghostgram.algorithms.in_run_shapley.settings import Settings, check, check_against, check_sharded
from ghostgram.algorithms.in_run_shapley.validation import Validation, ValidationSets
from ghostgram.taps import Coverage, cover
from ghostgram.training.linearize import check_optimizer
from ghostgram.training.ranks import Ranks


class InRunShapley:
    """In-Run Data Shapley, first and second order, in any training loop.

    For the optimizer's step `Delta = h + sum_i delta_i`, `delta_i = -P * g_i`, the value of sample i for validation
    set k is the Shapley value of the utility "change of l_k", expanded to first or second order:

        phi_ik = -<g_i, D_k>,      value_ik = -phi_ik,
        order 1:  D_k = P * grad l_k(w)
        order 2:  D_k = P * [grad l_k(w) + H_k (h + Delta) / 2]  ~  P * grad l_k(w + (h + Delta) / 2)

    so a *positive value means that the sample lowered the loss of set k*. `g_i` is the sample's share of the gradient
    the optimizer reads: its loss is used with the reduction it has, never rescaled, and clipping or a GradScaler
    between backward and step is observed. `P` is lr for SGD and `lr (1-b1)/(1-b1^t)/(sqrt(vhat)+eps)` for Adam and
    AdamW. Dots are taken in the layers' backward in the pass that computes the weight gradient; no per-sample
    gradient is stored. Training is what it would be without the engine, up to the summation order of weight gradients.

    Examples:
        >>> shapley = InRunShapley(model, optimizer, {"novels": lambda m: loss(m, held_out)})  # doctest: +SKIP
        >>> for batch in loader:
        ...     with shapley.step(ids=batch["id"]):
        ...         loss(model, batch).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> values = shapley.values()

    Args:
        model: The model trained. The first dimension of every covered layer's input must be the sample. May be wrapped
            in DistributedDataParallel or have been given to `fully_shard`; every rank then runs its own engine, and a
            method marked *collective* must be called on all of them (docs/algorithms/in_run_shapley_distributed.md).
        optimizer: torch.optim.SGD, Adam or AdamW over the model's parameters.
        validation: A callable model -> scalar loss, or a dict of them: K named validation sets. A `RotatingPool` reads
            another part of a larger set at every step.
        order: 1, or 2 for the second-order utility, whose ledger closes.
        log: A folder for the step log and the ledger (Parquet); None keeps them in memory.
        v_state: Adam's second moment in P: "pre" as before the batch; "post" as after it, so that the linearised step
            is the real one, at the price of directions that are known late; "secant" as "post", with P such that h is
            the real step without the batch too (docs/algorithms/in_run_shapley_fidelity.md): by far the nearest to the
            Shapley values of the real step. None: "pre" for order 1, "secant" for order 2.
            Adam's first step has no moment before the batch and always uses "post"; the log says which was used.
        curvature: Order 2 by "midpoint" (one validation gradient in the middle of the step, and more of them along it
            where the loss bends) or "hvp" (Hessian-vector products along it; needs a validation loss that can be
            differentiated twice).
        late: How dots are taken when directions are known only once the batch's gradient is (order 2, v_state "post",
            Adam's first step): "stored" keeps every layer's (a, b); "replay" runs `losses` again, forward and backward,
            with the same random states; "forward" takes forward-mode derivatives of `losses`' shares. "auto": replay
            where microbatches are accumulated and `losses` is given, else stored.
        refresh: Steps for which one validation gradient serves (order 1). The ledger measures at refreshes alone, and
            reports by how much the gradient had turned.
        exclude: Names or patterns of parameters left out of the scores; the ledger reports their joint effect.
        fallback: "error": a trainable parameter without a tap is an error; "jvp": its dots come from forward-mode
            derivatives of `losses`' shares, slower and exact. So do, from the first step on and with a warning, those
            of a parameter with a tap that is used elsewhere too, or on inputs whose first dimension is not the sample.
        audit_every: Compare all dots with forward-mode derivatives of `losses`' shares every so many steps; 0: never.
        on_audit_failure: "raise" an `AuditError`, or "mark": the ledger's column `audit` holds the error either way.
        compare_orders: With order 2, log first-order values beside (columns phi1_<set>): twice the directions.
        doc_mask: Whether attention is masked by document where `segments` are given. Then a document's values are
            exactly its own loss's; without, they are labelled "by position" in the log.
        flush_every: Steps between two writes of the log.
        resume: Append to a log that already holds steps; their numbers and the ledger's cumulative residual go on after
            the last one written. To go on from a checkpoint use `load_state_dict`.

    Raises:
        UncoveredParameterError: A trainable parameter has no tap; it is named.
        TypeError: The optimizer's step is not of the form `h - P * G`.
        ValueError: An argument is not as described, or the model is spread over processes in another way.
        ImportError: pyarrow is missing.
        FileExistsError: The log folder already holds a run.

    Cost:
        F being a forward of the batch, F_val one of the validation sets. Order 1: 3 F_val per step; 2 B d p K FLOPs per
        matrix parameter beside the 2 B T d p of its gradient; one parameter-sized array for each set. Order 2: 5 F_val,
        in a step that bends up to 84; F for "stored", which keeps (a, b) of all layers, 3 F for "replay", 3 K F for
        "forward"; one copy of the weights.

    Source:
        arXiv 2406.11011, Theorems 3 and 4; the linearisation of Adam, the midpoint form and the ledger are this
        library's (docs/algorithms/in_run_shapley.md).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        validation: Validation | Mapping[str, Validation],
        order: int = 1,
        log: str | Path | None = None,
        *,
        v_state: str | None = None,
        curvature: str = "midpoint",
        late: str = "auto",
        refresh: int = 1,
        exclude: Sequence[str] = (),
        fallback: str = "error",
        audit_every: int = 0,
        on_audit_failure: str = "raise",
        compare_orders: bool = False,
        doc_mask: bool = False,
        flush_every: int = 50,
        resume: bool = False,
    ) -> None:
        logs.require_pyarrow()
        check_optimizer(optimizer)
        settings = Settings(
            order, v_state or ("pre" if order == 1 else "secant"), curvature, late, refresh, audit_every,
            on_audit_failure, compare_orders, fallback,
        )  # fmt: skip
        check(settings)
        if flush_every < 1:
            raise ValueError(f"flush_every: expected at least 1, got {flush_every}")
        groups = {p: g for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
        self._ranks = Ranks(model, list(groups))
        if self._ranks.sharded:
            check_sharded(settings)
        self._sets = ValidationSets(validation, self._ranks)
        check_against(settings, self._sets, groups)
        self._optimizer, self._order, self._flush_every = optimizer, order, flush_every
        self._coverage = cover(self._ranks.model, groups, exclude, fallback)
        if not self._coverage.scored and not self._coverage.fallback:
            raise ValueError(f"exclude: expected at least one trainable parameter left to score, got {exclude!r}")
        self._scorer = Scorer(self._ranks, optimizer, self._sets, self._coverage, groups, settings)
        wide = any(p.dtype == torch.float64 for p in groups)
        metadata = {"reduction": "as in the training loss", "optimizer": type(optimizer).__name__,
                    "excluded": json.dumps(sorted(self._coverage.excluded)),
                    "documents": "exact" if doc_mask else "by position"}  # fmt: skip
        self._log = logs.RunLog(log, self._ranks, self._sets.names, compare_orders, wide, metadata, resume)
        self._note_fallback()
        self._number = int(self._ranks.largest(self._log.next_step())) - 1  # of the last step opened
        self._step: Step | None = None
        self._inside = False
        self._accumulating = False
        self._selection: OnlineSelection | None = None
        self._hook = optimizer.register_step_pre_hook(lambda *_: self._before_optimizer())

    # The loop ----------------------------------------------------------------------------------------------------

    @contextmanager
    def step(
        self,
        ids: Tensor | Sequence[int] | None = None,
        losses: Losses | None = None,
        segments: Tensor | None = None,
    ) -> Iterator[None]:
        """Scores the backward passes of one optimizer step; the optimizer's own step comes after the block.

        Args:
            ids: (B,) integer ids of the samples, in the order of the batch. None with gradient accumulation: each
                backward then goes into its own `with shapley.samples(ids)`.
            losses: Computes the loss of this batch again: see `samples`.
            segments: The documents of packed rows: see `samples`.

        Raises:
            RuntimeError: A step is open already.
        """
        if self._inside:
            raise RuntimeError("shapley.step() was entered twice: close one step before the next")
        if self._sets.rotates:
            self._finish_step()  # on the part that it was scored with
        opened = self._scorer.open(self._number + 1)
        self._finish_step(opened.losses, measure=False)
        self._number += 1
        self._step, self._inside, self._accumulating = opened, True, ids is None
        try:
            if ids is None:
                yield
            else:
                with self.samples(ids, losses, segments):
                    yield
            self._scorer.close_backward(opened)
        except BaseException:
            self._step = None  # a half-scored step is dropped whole
            raise
        finally:
            self._inside = False

    @contextmanager
    def samples(
        self, ids: Tensor | Sequence[int], losses: Losses | None = None, segments: Tensor | None = None
    ) -> Iterator[None]:
        """Scores one microbatch of an open step: the backward inside belongs to these samples.

        Args:
            ids: (B,) integer ids of the samples; of the documents where there are segments.
            losses: A callable without arguments that computes again what backward is called on, a GradScaler's factor
                and autocast included: as a scalar for late="replay", and as every sample's share of it, (B,), for
                late="forward", fallback="jvp" and audits.
            segments: (B, T) integers for rows packed with documents: which of `ids` each position belongs to, negative
                for none. Dots of a position are those of the position that *predicts*, so a target in another document
                should be masked by the loader.

        Raises:
            RuntimeError: No step is open.
            ValueError: ids are not (B,) integers, or segments do not fit to them.
        """
        if not self._inside or self._step is None:
            raise RuntimeError("shapley.samples() was entered outside `with shapley.step()`")
        listed = _integers(ids)
        if segments is not None:
            _check_segments(segments, len(listed))
        with self._scorer.backward(self._step, listed, losses, segments, self._accumulating):
            yield

    @contextmanager
    def select(
        self,
        ids: Tensor | Sequence[int],
        keep: int | None = None,
        method: str | Choose = "top-k",
        *,
        least: float = 0.0,
        curvature: float | None = None,
        seed: int = 0,
        rescale: bool = True,
        loss_scale: float = 1.0,
        losses: Losses | None = None,
    ) -> Iterator[Chosen]:
        """Scores the samples of one backward, and trains on the best of them alone, in that one backward.

        In place of `step(ids)`; inside an open step in place of `samples(ids)`. After the block .grad holds the sum of
        the chosen samples' gradients, each times its weight: with a mean over samples as loss and `rescale` it is the
        gradient of the mean over the chosen ones. All candidates are logged, with columns weight and candidate_<set>.

        Args:
            ids: (B,) integer ids of the candidates.
            keep: How many samples to choose; None for "threshold" or a callable.
            method: "top-k" by the first-order value <g_i, P * g_val>, a mean over the sets; "greedy", GREATS' choice,
                which counts what samples have in common against them; "threshold"; "random", the control; or a callable
                from `Candidates` to rows (n,) int64 or weights (B,).
            least: What a value must exceed under "threshold".
            curvature: lambda of "greedy"; None: measured along the last step, see `StepCurvature`.
            seed: Of "random", which draws anew in every step.
            rescale: Multiply the chosen samples' gradients by B / n.
            loss_scale: A GradScaler's factor, for methods that do not go by order alone: `scaler.get_scale()`.
            losses: For audits: see `samples`.

        Raises:
            ValueError: The engine's scores come too late to choose by (order 2, v_state "post"), or a bad argument.
            UncoveredParameterError: A trainable parameter has no tap, excluded or not: it is named.
            RuntimeError: A gradient reached a parameter past its layer, or there are several ranks.

        Cost:
            A forward, the input gradients and the scores of all B candidates, and the weight gradients of n; every
            layer's (a, b) until then. "greedy": the Gram matrix, about twice the weight gradients of all B; with
            a measured curvature a copy of the weights and one of the validation gradient.
        """
        if self._order != 1 or self._scorer.settings.v_state != "pre":
            raise ValueError(
                "select: expected order=1 and v_state='pre', whose scores are known in the backward itself"
            )
        self._selection = self._selection or OnlineSelection(self._scorer)
        listed = _integers(ids)
        if method == "greedy" and curvature is None:
            self._scorer.curvature = self._scorer.curvature or StepCurvature()
        with nullcontext() if self._inside else self.step():
            assert self._step is not None
            draw = (seed, self._step.number, len(self._step.microbatches))
            measured = self._scorer.curvature
            known = curvature if curvature is not None else measured.value if measured is not None else 0.0
            request = Request(chooser(method, keep, least, known, draw, len(listed)), rescale, loss_scale)
            request.chosen.weights = torch.ones(len(listed), dtype=torch.float64)  # unless they can be scored
            around = partial(self._selection.around, request=request)
            with self._scorer.backward(self._step, listed, losses, None, self._accumulating, around):
                yield request.chosen

    def values(self) -> Any:
        """The value of every sample of this rank: a pyarrow.Table with id, set, value (positive = helped), steps."""
        return logs.aggregate(self._log.steps.read(), self._sets.names)

    def step_log(self) -> Any:
        """Every scored sample of every step of this rank: a pyarrow.Table with the raw phi of each set, -value."""
        return self._log.steps.read()

    def ledger(self) -> Any:
        """Predicted and measured change of each validation loss, step by step: a pyarrow.Table. Collective.

        Closes the last step by measuring its validation losses, if the optimizer has taken it. A step that still waits
        for the optimizer stays open, and has no row yet. The same on all ranks, but that the first one alone has rows
        from before a resumption.
        """
        if self._step is not None and self._step.result is not None:
            self._finish_step()
        return self._log.ledger.read()

    def coverage(self) -> Coverage:
        """Which layer covers each trainable parameter."""
        return self._coverage

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint beside the states of model and optimizer; take it between two steps. Collective.

        Finishes the last step and writes the log of every rank, so that a run resumed from the checkpoint by
        `load_state_dict` has every sample of every step exactly once, whatever was logged after it. The same on all
        ranks, except under `fully_shard` with refresh > 1: then each keeps and loads its own.

        Raises:
            RuntimeError: A step is open.
        """
        if self._inside:
            raise RuntimeError("shapley.state_dict() was called inside `with shapley.step()`: call it between steps")
        self._finish_step()
        self._log.flush()
        self._ranks.wait()
        return {"step": self._number + 1, "log": self._log.state(), "held": self._scorer.held()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint: drops what the log holds of later steps. Needs `resume=True` where there is a log.

        Raises:
            ValueError: The log lacks steps before the checkpoint.
            RuntimeError: A step was made already.
        """
        if self._step is not None:
            raise RuntimeError("shapley.load_state_dict() was called after a step: call it before the first one")
        self._log.rewind(int(state["step"]), state["log"])
        self._number = int(state["step"]) - 1
        self._scorer.hold(state["held"])

    def close(self) -> None:
        """Finishes the last step, writes what is left of the log, and lets go of the optimizer. Collective."""
        self._finish_step()
        self._log.flush()
        self._hook.remove()

    # Between steps -------------------------------------------------------------------------------------------------

    def _before_optimizer(self) -> None:
        """The optimizer is about to step: the step's values are known now."""
        step = self._step
        if self._inside:
            raise RuntimeError("optimizer.step() ran inside `with shapley.step()`: call it after the block")
        if step is None or step.record is None:
            return
        try:
            self._scorer.close(step)
        except BaseException:
            self._step = None
            raise
        self._note_fallback()
        self._log.samples(step, self._order)

    def _note_fallback(self) -> None:
        """What forward mode scores, which parameters may join from step to step, goes into the log's metadata."""
        self._log.note("fallback", json.dumps(sorted(self._coverage.fallback)))

    def _finish_step(self, after: Tensor | None = None, measure: bool = True) -> None:
        """Closes the last step with the validation losses after it, as the next step has found them or measured here.

        A step that the optimizer never took, as when a GradScaler skips one, moved nothing: its phi are logged as 0.
        """
        step, self._step = self._step, None
        if step is None:
            return
        if step.result is None:
            self._scorer.skip(step)
            self._log.samples(step, self._order)
        if after is None and measure:
            self._sets.turn_to(step.number)
            after = self._sets.losses(self._ranks.model)
        self._log.change(step, after, self._order)
        if (step.number + 1) % self._flush_every == 0:
            self._log.flush()


def _integers(ids: Tensor | Sequence[int]) -> list[int]:
    listed = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not isinstance(listed, list) or not listed or not all(isinstance(i, int) for i in listed):
        raise ValueError(f"ids: expected a non-empty (B,) list or array of integers, got {ids!r}")
    return listed


def _check_segments(segments: Tensor, documents: int) -> None:
    if segments.dim() != 2 or segments.is_floating_point():
        raise ValueError(f"segments: expected (B, T) integers, got {segments.dtype} of shape {tuple(segments.shape)}")
    if segments.numel() and int(segments.max()) >= documents:
        raise ValueError(
            f"segments: expected numbers below {documents}, one for each of ids, got {int(segments.max())}"
        )
