"""What one optimizer step did for the validation sets: directions, dots, checks, values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ghostgram.algorithms.in_run_shapley import directions as ways
from ghostgram.algorithms.in_run_shapley.audit import UntappedUseError, audited, check_sums, unlike_the_oracle
from ghostgram.algorithms.in_run_shapley.directions import Directions, dot
from ghostgram.algorithms.in_run_shapley.microbatch import Losses, Microbatch
from ghostgram.algorithms.in_run_shapley.scaling import GradientRecord
from ghostgram.algorithms.in_run_shapley.select import StepCurvature
from ghostgram.algorithms.in_run_shapley.settings import Settings
from ghostgram.algorithms.in_run_shapley.validation import Gradient, ValidationSets
from ghostgram.taps import Coverage, Taps
from ghostgram.taps.sharding import local, parts_of
from ghostgram.training.aside import RandomStates
from ghostgram.training.gathered import gathered
from ghostgram.training.linearize import Linearised, linearize, state_is_ready
from ghostgram.training.ranks import Ranks
from ghostgram.training.secant import secant

Selection = Callable[[Microbatch, Directions], AbstractContextManager[None]]
"""Around a backward that is scored along the directions, and whose samples are chosen then."""


@dataclass
class Step:
    """One optimizer step, from its validation pass to the next one's."""

    number: int
    lrs: list[float]
    losses: Tensor | None  # (K,) float64 before the step; None between refreshes
    gradients: list[Gradient]  # of the validation losses, one per set, while they are needed
    age: int = 0  # steps since the validation gradient was taken
    turned: tuple[Tensor, Tensor] | None = None  # cosine and norm ratio (K,) of the last gradient to this one
    directions: Directions | None = None  # None: known only once the batch's gradient is
    history: Directions = field(default_factory=dict)  # (K,) of every parameter that has one
    microbatches: list[Microbatch] = field(default_factory=list)
    record: GradientRecord | None = None
    result: Result | None = None  # once the optimizer has stepped


class Result(NamedTuple):
    """What a step's log rows and ledger rows are made of; of each set (K,) float64."""

    phis: list[Tensor]
    """Per microbatch of this process (rows, K) float64."""
    candidates: list[Tensor | None]
    """The same at weight 1, where an online selection has chosen."""
    first_order: list[Tensor] | None
    """The same of order 1 and the same P, if orders are compared."""
    sum_phi: Tensor
    """Over the samples of all processes."""
    history: Tensor
    uncovered: Tensor
    clip: float
    v_state: str
    audit: float | None
    """Largest error of an audited dot over the size of its terms; None for steps not audited."""
    skipped: bool = False


class Scorer:
    """Scores one step after another; it keeps no log."""

    def __init__(
        self,
        ranks: Ranks,
        optimizer: torch.optim.Optimizer,
        sets: ValidationSets,
        coverage: Coverage,
        groups: ways.Groups,
        settings: Settings,
    ) -> None:
        self.ranks, self.model, self.optimizer, self.sets = ranks, ranks.model, optimizer, sets
        self.coverage, self.groups, self.settings = coverage, groups, settings
        self.taps = Taps(coverage, list(coverage.scored.values()), pass_over=settings.fallback == "jvp")
        self.names = {p: n for n, p in (coverage.scored | coverage.fallback | coverage.excluded).items()}
        self._fallback = list(coverage.fallback.values())
        self._held: list[Gradient] = []  # the validation gradient between refreshes
        self._age = 0
        self.curvature: StepCurvature | None = None  # once a selection wants it

    # Phases of a step ------------------------------------------------------------------------------------------------

    def open(self, number: int) -> Step:
        """Before the first forward: the validation pass, and the directions if they are known already."""
        settings = self.settings
        self.sets.turn_to(number)
        step = Step(number, self._lrs(), None, [])
        if settings.order == 2 and settings.curvature == "midpoint" and not settings.compare_orders:
            step.losses = self.sets.losses(self.model)
        elif self._held and self._age + 1 < settings.refresh:
            self._age += 1
            step.age, step.gradients = self._age, self._held
        else:
            step.losses, step.gradients = self.sets.gradients(self.model, list(self.groups))
            if self.curvature is not None:
                self.curvature.see(step.gradients)
            if settings.refresh > 1:
                step.turned = _turned(self._held, step.gradients, self.ranks) if self._held else None
                self._held, self._age = step.gradients, 0
        if settings.order == 1 and settings.v_state == "pre" and self._state_is_ready():
            step.directions = self._first_order(step, None)
        return step

    @contextmanager
    def backward(
        self,
        step: Step,
        ids: list[int],
        losses: Losses | None,
        segments: Tensor | None,
        accumulating: bool,
        selection: Selection | None = None,
    ) -> Iterator[None]:
        """Around one forward and backward of the step, all of whose samples count unless a selection chooses."""
        microbatch = Microbatch(ids, losses, segments, ranks=self.ranks.size)
        microbatch.way = self._way(step, microbatch, accumulating)
        if losses is not None:
            microbatch.states = RandomStates(self.model)
        if step.directions is not None:
            self._ask_oracle(step, microbatch, step.directions)
        if selection is not None and step.directions is not None:
            with selection(microbatch, step.directions):
                yield
        elif microbatch.way in ("early", "stored"):
            with microbatch.scored(self.taps, step.directions and self._placed(self._tapped(step.directions))):
                yield
        else:
            yield
        step.microbatches.append(microbatch)

    def close_backward(self, step: Step) -> None:
        """After the last backward of the step: what the gradients are before anything scales them."""
        if not step.microbatches:
            raise RuntimeError("no samples were scored in this step: pass ids to step(), or use samples(ids) inside it")
        step.record = GradientRecord(self.groups, self.ranks)
        if step.directions is not None:
            for microbatch in step.microbatches:
                microbatch.fetch()
            self._check(step, step.directions, {})

    def close(self, step: Step) -> None:
        """The optimizer is about to step: the scale of every gradient is known now, and so are the values."""
        assert step.record is not None
        if (lrs := self._lrs()) != step.lrs:
            raise RuntimeError(
                f"the learning rates changed from {step.lrs} to {lrs} between shapley.step() and optimizer.step()"
            )
        scales = step.record.scales(self.names)
        directions, v_state, history = step.directions, "pre", torch.zeros(len(self.sets.names), dtype=torch.float64)
        if directions is None:
            scaled = {p: local(p.grad) for p in self.groups if p.grad is not None}
            v_state = "secant" if self.settings.v_state == "secant" else "post"
            directions, history = self._late_directions(step, scaled)
            for microbatch in step.microbatches:
                self._take_late(step, microbatch, directions)
            self._check(step, directions, scales)
        for parameter, carried in step.history.items():
            if parameter.grad is not None:  # else the optimizer skips it: neither momentum nor decay move it
                history = history + carried
        at_one = [-self._total(step, microbatch, scales) for microbatch in step.microbatches]
        weights = [microbatch.weights for microbatch in step.microbatches]
        phis = [phi if w is None else w[:, None] * phi for phi, w in zip(at_one, weights, strict=True)]
        candidates = [None if w is None else phi for phi, w in zip(at_one, weights, strict=True)]
        audit = audited(self, step, directions)
        sets = len(history)
        uncovered = torch.zeros_like(history)
        left_out = [
            (local(p.grad), d)
            for p in self.coverage.excluded.values()
            if p.grad is not None
            for d in directions[p][:sets]
        ]
        if left_out:
            products = gathered(dot(grad, d) for grad, d in left_out).view(-1, sets).sum(0)
            uncovered -= self.ranks.over_elements(products)
        first_order = [phi[:, sets:] for phi in phis] if self.settings.compare_orders else None
        phis = [phi[:, :sets] for phi in phis]
        sum_phi = self.ranks.over_samples(torch.stack([phi.sum(0) for phi in phis]).sum(0))
        clip = min(scales.values(), default=1.0)
        step.result = Result(phis, candidates, first_order, sum_phi, history, uncovered, clip, v_state, audit)
        step.directions, step.gradients, step.record = None, [], None
        step.microbatches = [Microbatch(m.ids, segments=m.segments, weights=m.weights) for m in step.microbatches]

    def skip(self, step: Step) -> None:
        """A step that the optimizer never took moved nothing."""
        nothing = torch.zeros(len(self.sets.names), dtype=torch.float64)
        phis = [torch.zeros(len(m.ids), len(nothing), dtype=torch.float64) for m in step.microbatches]
        compared = phis if self.settings.compare_orders else None
        candidates = [None if m.weights is None else phi for m, phi in zip(step.microbatches, phis, strict=True)]
        step.result = Result(
            phis, candidates, compared, nothing, nothing, nothing, 1.0, self.settings.v_state, None, skipped=True
        )

    def held(self) -> dict[str, Any]:
        """The validation gradient that later steps will use again, for a checkpoint."""
        named = [{self.names[p]: g for p, g in gradient.items()} for gradient in self._held]
        return {"gradients": named, "age": self._age}

    def hold(self, held: Mapping[str, Any]) -> None:
        """Takes back what `held` gave."""
        self._held = [{p: gradient[n].to(p.device) for p, n in self.names.items()} for gradient in held["gradients"]]
        self._age = int(held["age"])

    # Directions ------------------------------------------------------------------------------------------------------

    def _first_order(self, step: Step, scaled: Mapping[nn.Parameter, Tensor] | None) -> Directions:
        """P * grad l_k, and the history into the step."""
        held = self.settings.refresh > 1
        gradients = [{p: g.clone() for p, g in each.items()} if held else each for each in step.gradients]
        step.gradients = []
        directions, step.history = ways.first_order(self._linearise, self.groups, gradients, scaled, self.ranks)
        return directions

    def _late_directions(self, step: Step, scaled: Mapping[nn.Parameter, Tensor]) -> tuple[Directions, Tensor]:
        """Directions that depend on the batch's own gradient, and the history where order 2 gives it as a sum."""
        settings = self.settings
        nothing = torch.zeros(len(self.sets.names), dtype=torch.float64)
        if settings.order == 1:
            return self._first_order(step, scaled), nothing
        common = (self._linearise, self.groups, self.sets, self.model, scaled)
        if settings.curvature == "hvp":
            directions, history = ways.by_hessian(*common)
        else:
            assert step.losses is not None
            directions, history = ways.along_the_step(*common, before=step.losses, ranks=self.ranks)
        if settings.compare_orders:
            first = ways.preconditioned(self._linearise, self.groups, step.gradients, scaled)
            directions = {p: torch.cat([d, first[p]]) for p, d in directions.items()}
        return directions, history

    def _linearise(
        self, group: Mapping[str, Any], parameters: Sequence[Tensor], grads: Sequence[Tensor] | None
    ) -> list[Linearised]:
        """The optimizer's step as `h - P * G`."""
        if grads is not None and self.settings.v_state == "secant":
            return secant(self.optimizer, group, parameters, grads)
        return linearize(self.optimizer, group, parameters, grads)

    def _placed(self, directions: Directions) -> Directions:
        """As the taps take them: a sharded parameter's directions as sharded tensors of their own."""
        return {p: parts_of(d, p) for p, d in directions.items()}

    # Dots ------------------------------------------------------------------------------------------------------------

    def _way(self, step: Step, microbatch: Microbatch, accumulating: bool) -> str:
        if step.directions is not None:
            return "early"
        way = self.settings.late
        if way == "auto":
            way = "replay" if accumulating and microbatch.losses is not None else "stored"
        if way != "stored" and microbatch.losses is None:
            raise ValueError(f"losses: expected a callable that computes the loss again, for late={way!r}; got None")
        return way

    def _take_late(self, step: Step, microbatch: Microbatch, directions: Directions) -> None:
        self._ask_oracle(step, microbatch, directions)
        if microbatch.way == "stored":
            microbatch.dots = Taps.contract(microbatch.kept, self._placed(self._tapped(directions)))
            microbatch.kept = []
        elif microbatch.way == "replay":
            with self.ranks.aside():
                microbatch.replayed(self.taps, self._placed(self._tapped(directions)), list(self.groups))
        else:
            microbatch.joint = self.derivatives(microbatch, self._scored(directions))
        microbatch.fetch()

    def _ask_oracle(self, step: Step, microbatch: Microbatch, directions: Directions) -> None:
        """The dots that forward-mode passes give: of parameters without a tap, and of all of them for an audit."""
        if microbatch.way != "forward" and (along := self._along(directions)):
            microbatch.joint = self.derivatives(microbatch, along)
        if self.audits(step):
            microbatch.oracle = self.derivatives(microbatch, self._scored(directions))

    def derivatives(self, microbatch: Microbatch, along: Directions) -> Tensor:
        """(rows, K) of every sample's share of the loss, by forward mode."""
        with self.ranks.aside():
            return microbatch.derivatives(self.model, along)

    def audits(self, step: Step) -> bool:
        """Whether a step's dots are compared with the oracle's."""
        every = self.settings.audit_every
        return bool(every) and step.number % every == 0

    def _total(self, step: Step, microbatch: Microbatch, scales: Mapping[nn.Parameter, float]) -> Tensor:
        """(rows, K) sum over parameters of scale * dots."""
        total = torch.zeros(0)
        if microbatch.dots:
            factors = torch.tensor([scales.get(p, 1.0) for p in microbatch.dots], dtype=torch.float64)
            total = torch.tensordot(factors, torch.stack(list(microbatch.dots.values())), 1)
        if microbatch.joint is None:
            return total
        joint = self._common_scale(step, scales, microbatch) * microbatch.joint
        return joint + total if microbatch.dots else joint

    def _common_scale(self, step: Step, scales: Mapping[nn.Parameter, float], microbatch: Microbatch) -> float:
        """The one factor between backward and step of the gradients whose dots are known only together."""
        together = self._fallback if microbatch.dots else [*self.coverage.scored.values(), *self._fallback]
        assert step.record is not None
        found = [scales[p] for p in together if step.record.norm(p)]  # a zero gradient has no scale
        if max(found, default=1.0) - min(found, default=1.0) > 1e-5 * max(found, default=1.0):
            raise RuntimeError(
                "gradients of parameters scored by forward mode were scaled by different factors "
                f"({min(found):.6g} to {max(found):.6g}): clip them together"
            )
        return found[0] if found else 1.0

    def _check(self, step: Step, directions: Directions, scales: Mapping[nn.Parameter, float]) -> None:
        """The sum check, after which parameters with an untapped use may join those that forward mode scores."""
        assert step.record is not None
        if self.settings.fallback == "jvp" and self._demote(step, directions, self.taps.passed_over):
            # Where tokens are dispatched, as many of them as samples may have been taken for these: their sum is right.
            self._demote(step, directions, unlike_the_oracle(self, step.microbatches, directions))
        try:
            check_sums(self, step.microbatches, directions, step.record, scales)
        except UntappedUseError as missed:
            if self.settings.fallback == "error":
                raise
            self._demote(step, directions, missed.parameters)
            check_sums(self, step.microbatches, directions, step.record, scales)

    def _demote(self, step: Step, directions: Directions, parameters: Iterable[nn.Parameter]) -> bool:
        """From now on forward mode scores these parameters, whose taps do not see all of their uses; False if none.

        On all ranks those that any of them names: what one has, others may have used as the taps expect.
        """
        scored, missed = list(self.coverage.scored), {self.names[p] for p in parameters}
        found = self.ranks.over_samples(torch.tensor([name in missed for name in scored], dtype=torch.float64))
        names = [name for name, ranks in zip(scored, found, strict=True) if ranks]
        self.taps.passed_over.clear()
        if not names:
            return False
        warnings.warn(
            f"{', '.join(names)}: used outside their layer's forward, or on inputs whose first dimension is not the "
            "sample; scored by forward mode from now on",
            stacklevel=2,
        )
        self.coverage.demote(names, "used where no tap sees it by sample")
        self._fallback = list(self.coverage.fallback.values())
        for microbatch in step.microbatches:
            for name in names:
                microbatch.dots.pop(self.coverage.fallback[name], None)
            if microbatch.way != "forward":
                microbatch.joint = self.derivatives(microbatch, self._along(directions))
        return True

    def _along(self, directions: Directions) -> Directions:
        """The directions of parameters that forward mode scores and that backward has reached."""
        return {p: directions[p] for p in self._fallback if p in directions}

    def _scored(self, directions: Directions) -> Directions:
        """The directions of all parameters but the excluded ones."""
        excluded = set(self.coverage.excluded.values())
        return {p: d for p, d in directions.items() if p not in excluded}

    def _tapped(self, directions: Directions) -> Directions:
        """The directions of the parameters that forward mode does not score."""
        fallback = set(self._fallback)
        return {p: d for p, d in directions.items() if p not in fallback}

    def _lrs(self) -> list[float]:
        return [float(g["lr"]) for g in self.optimizer.param_groups]

    def _state_is_ready(self) -> bool:
        return all(state_is_ready(self.optimizer, p) for p in self.groups)


def _turned(old: Sequence[Gradient], new: Sequence[Gradient], ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Cosine of and norm ratio old / new of every set's gradient, (K,): what a refresh finds it had drifted by."""
    products = torch.stack(
        [
            torch.stack([gathered(dot(x[p], y[p]) for p in b).sum() for x, y in ((a, b), (a, a), (b, b))])
            for a, b in zip(old, new, strict=True)
        ]
    )
    across, before, after = ranks.over_elements(products).unbind(1)
    return across / (before * after).sqrt(), (before / after).sqrt()
