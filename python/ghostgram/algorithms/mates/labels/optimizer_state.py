"""The optimizer's next step as a function of one document's gradient, from the checkpoint's own state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ghostgram.taps.sharding import local
from ghostgram.training.gathered import gathered
from ghostgram.training.linearize import SUPPORTED, Linearised, is_decoupled, local_state, sgd_step
from ghostgram.training.ranks import Ranks
from ghostgram.training.secant import adam_secant

MOMENTS = ("exp_avg", "exp_avg_sq")
NAMED = 8
"""Names that an error lists before it counts the rest."""


class OptimizerView:
    """Update t+1 of an optimizer, as it depends on the gradient of one document, by parameter.

    The update on a document x whose clipped gradient is g goes to

        theta_x = theta_null + delta(g),        theta_null = the update on gradient 0: momentum and weight decay alone.

    AdamW's delta, elementwise and without a difference of near numbers, with r0 = sqrt(b2 v / bc2),
    q = (1 - b2) g^2 / bc2, r = sqrt(r0^2 + q), s = r + eps, s0 = r0 + eps and bc = 1 - b^(t+1):

        delta(g) = -eta [(1-b1) g / (bc1 s) - (b1 m / bc1) q / ((r + r0) s s0)]
        slope    = -d delta / dg at 0 = eta (1-b1) / (bc1 s0)

    Adam's coupled weight decay is part of what it reads on gradient 0; SGD's delta is -slope * g, at any size of g.

    Tensors of 16 bits are taken to float32. Of sharded parameters everything is this process's part.

    Args:
        model: The model as it is trained, wrapper included.
        optimizer: Any, with the state of its last step: of what `why_not` names, its state is checked and nothing else
            can be told.
        clip: The largest norm of the gradient over all trainable parameters, as `clip_grad_norm_` takes it; None for no
            clipping.
        lrs: The learning rate of update t+1 by parameter group; None for those that the groups hold.

    Raises:
        ValueError: Trainable parameters and optimizer do not match one to one, or a state is missing, of another shape,
            not finite, or of no step yet; the parameters are named.

    Cost:
        `null`, `delta` and `slope` take about 25 operations an element.

    Source:
        arXiv 2406.06046 takes the step by the optimizer itself; the split and its closed form are derived in
        docs/algorithms/mates.md.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None,
        lrs: Sequence[float] | None = None,
    ) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: expected a positive norm or None, got {clip}")
        groups = optimizer.param_groups
        if lrs is not None and len(lrs) != len(groups):
            raise ValueError(f"lrs: expected {len(groups)}, one for each parameter group, got {len(lrs)}")
        self.optimizer, self.clip = optimizer, clip
        self.lrs = [float(lr) for lr in (lrs if lrs is not None else [group["lr"] for group in groups])]
        """The learning rate of update t+1, by parameter group."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.ranks = Ranks(model, parameters)
        self.model = self.ranks.model
        """The model without DistributedDataParallel's wrapper."""
        self.names: dict[nn.Parameter, str] = {p: n for n, p in self.model.named_parameters() if p.requires_grad}
        """Every trainable parameter's name, in the model's order."""
        self.linear = isinstance(optimizer, torch.optim.SGD)
        """Whether delta is a multiple of g: SGD with or without momentum."""
        self._group = {p: index for index, group in enumerate(groups) for p in group["params"]}
        self._check()

    def why_not(self) -> str | None:
        """Why `null`, `delta` and `slope` cannot be told, or None."""
        if type(self.optimizer) in SUPPORTED:
            return None
        names = ", ".join(kind.__name__ for kind in SUPPORTED)
        return f"the step of {type(self.optimizer).__name__} has no closed form here, unlike {names}'s"

    def why_no_moments(self) -> str | None:
        """Why `moments` and `scalars` do not describe the step, or None: where it is AdamW's of `delta`'s formula."""
        if self.linear or (reason := self.why_not()):
            return reason if not self.linear else "SGD has no second moment"
        for name, held in (("amsgrad", "a maximum"), ("maximize", "another sign")):
            if any(group[name] for group in self.optimizer.param_groups):
                return f"{name}=True: the step has {held}"
        if any(g["weight_decay"] and not is_decoupled(self.optimizer, g) for g in self.optimizer.param_groups):
            return "Adam's weight decay is coupled: the step reads it with the gradient"
        return None

    # The step, of one parameter ------------------------------------------------------------------------------------

    def null(self, p: nn.Parameter) -> Tensor:
        """theta_null: where the update on gradient 0 takes a parameter."""
        _, h = self._linearised(p, None)
        here = wide(local(p.detach()))
        return here.clone() if h is None else here + h

    def delta(self, p: nn.Parameter, g: Tensor, rows: Tensor | None = None) -> Tensor:
        """theta_x - theta_null for a document's clipped gradient of the parameter.

        Args:
            p: The parameter.
            g: The gradient, of p's shape, or (*shape of rows, *p.shape[1:]).
            rows: Entries along p's first axis that g is of, in any order and as often as wanted; None for all of p.
        """
        return -self._linearised(p, g, rows).P * wide(local(g))

    def slope(self, p: nn.Parameter) -> Tensor:
        """-d delta / dg at 0, elementwise; a scalar tensor for SGD.

        Where no gradient has ever come (v = 0) it is eta (1-b1) / (bc1 eps).
        """
        return self._linearised(p, None).P

    def scalars(self, p: nn.Parameter) -> tuple[float, float, float, float, float, float]:
        """eta, b1, b2, eps, bc1 and bc2 of update t+1, where `why_no_moments` is None."""
        group = self._settings(p)
        b1, b2 = (float(beta) for beta in group["betas"])
        step = float(self.optimizer.state[p]["step"]) + 1.0
        return float(group["lr"]), b1, b2, float(group["eps"]), 1.0 - b1**step, 1.0 - b2**step

    def moments(self, p: nn.Parameter) -> tuple[Tensor, Tensor]:
        """m and v before the update, where `why_no_moments` is None."""
        state = local_state(self.optimizer, p)
        return wide(state["exp_avg"]), wide(state["exp_avg_sq"])

    # The step, of all of them --------------------------------------------------------------------------------------

    @contextmanager
    def at_null(self) -> Iterator[None]:
        """All trainable weights at theta_null inside, and outside to the bit what they were.

        Memory: one copy of them.
        """
        weights = [local(p.detach()) for p in self.names]
        kept = [w.clone() for w in weights]
        try:
            for p, w in zip(self.names, weights, strict=True):
                w.copy_(self.null(p))
            with self.ranks.aside():
                yield
        finally:
            torch._foreach_copy_(weights, kept)

    def clip_factors(self, norms: Tensor) -> Tensor:
        """c_x = min(1, clip / (|g| + 1e-6)), from gradient norms of any shape; torch's formula."""
        if self.clip is None:
            return torch.ones_like(norms)
        return (self.clip / (norms + 1e-6)).clamp(max=1.0)

    def _linearised(self, p: nn.Parameter, g: Tensor | None, rows: Tensor | None = None) -> Linearised:
        if reason := self.why_not():
            raise TypeError(f"optimizer: {reason}; only the exact labels can be taken")
        group = self._settings(p)
        with torch.no_grad():

            def at(x: Tensor) -> Tensor:
                return wide(x if rows is None or not x.dim() else x[rows])

            state = {n: at(v) if isinstance(v, Tensor) else v for n, v in local_state(self.optimizer, p).items()}
            w = at(local(p.detach()))
            if self.linear:
                return sgd_step(group, w, state)
            read = torch.zeros_like(w) if g is None else wide(local(g))
            return adam_secant(group, w, state, read, is_decoupled(self.optimizer, group))

    def _settings(self, p: nn.Parameter) -> Mapping[str, Any]:
        index = self._group[p]
        return {**self.optimizer.param_groups[index], "lr": self.lrs[index]}

    # Whether they belong together ----------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raises unless there is exactly one good state entry for each trainable parameter."""
        names: dict[Tensor, str] = {p: n for n, p in self.model.named_parameters()}
        if missing := [n for p, n in self.names.items() if p not in self._group]:
            raise ValueError(f"optimizer: {_are(missing)} trainable, but in none of its groups")
        of_others = [
            f"group {index}'s parameter {i} of shape {tuple(p.shape)}"
            for index, group in enumerate(self.optimizer.param_groups)
            for i, p in enumerate(group["params"])
            if p not in names
        ]
        if of_others:
            raise ValueError(f"optimizer: {_are(of_others)} not of the model")
        left_over = [
            names.get(p, f"a tensor of shape {tuple(p.shape)}")
            for p, state in self.optimizer.state.items()
            if state and p not in self.names
        ]
        if left_over:
            raise ValueError(f"optimizer.state: {_are(left_over)} not trainable, and yet has a state")
        if not self.linear and self.why_not() is None:
            self._check_moments()
        unlike = [
            f"{name}'s momentum_buffer has shape {tuple(buffer.shape)}, not {tuple(p.shape)}"
            for p, name in self.names.items()
            if (buffer := self.optimizer.state.get(p, {}).get("momentum_buffer")) is not None
            and buffer.shape != p.shape
        ]
        if unlike:
            raise ValueError(f"optimizer.state: {listed(unlike)}")
        self._check_finite()

    def _check_moments(self) -> None:
        states = {name: self.optimizer.state.get(p, {}) for p, name in self.names.items()}
        if missing := [name for name, state in states.items() if "step" not in state]:
            raise ValueError(
                f"optimizer.state: {_are(missing)} without a state; take a step first, load it, or freeze what no "
                "loss reaches"
            )
        unlike = []
        for p, name in self.names.items():
            kinds = (*MOMENTS, "max_exp_avg_sq") if self._settings(p)["amsgrad"] else MOMENTS
            for kind in kinds:
                if kind not in states[name]:
                    unlike.append(f"{name} has no {kind}")
                elif (shape := states[name][kind].shape) != p.shape:
                    unlike.append(f"{name}'s {kind} has shape {tuple(shape)}, not {tuple(p.shape)}")
        if unlike:
            raise ValueError(f"optimizer.state: {listed(unlike)}")
        steps = gathered(torch.as_tensor(state["step"]) for state in states.values())
        if fresh := [name for name, step in zip(states, steps.tolist(), strict=True) if not step > 0]:
            raise ValueError(f"optimizer.state: {_are(fresh)} at step 0; take a step first")

    def _check_finite(self) -> None:
        largest = [
            (name, kind, local(value).abs().max().float())
            for p, name in self.names.items()
            for kind, value in self.optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor) and value.is_floating_point() and local(value).numel()
        ]
        finite = gathered(each[2] for each in largest).isfinite().tolist() if largest else []
        wrong = [f"{name}'s {kind}" for (name, kind, _), good in zip(largest, finite, strict=True) if not good]
        if wrong:
            raise ValueError(f"optimizer.state: {_are(wrong)} not finite")


def wide(tensor: Tensor) -> Tensor:
    """A 16-bit tensor in float32, others as they are: a step of 1e-3 of a weight is lost in 8 bits."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 2 else tensor


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _are(names: Sequence[str]) -> str:
    return listed(names) + (" is" if len(names) == 1 else " are")
