"""Two checks of a step's dots: their sum, on every step, and each of them against an oracle, when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ghostgram.algorithms.in_run_shapley.directions import Directions, dot
from ghostgram.algorithms.in_run_shapley.scaling import GradientRecord
from ghostgram.taps.sharding import local
from ghostgram.training.gathered import gathered

if TYPE_CHECKING:
    from ghostgram.algorithms.in_run_shapley.microbatch import Microbatch
    from ghostgram.algorithms.in_run_shapley.scoring import Scorer, Step


class AuditError(RuntimeError):
    """Dots of the taps differ from the derivative of the samples' losses."""


class UntappedUseError(RuntimeError):
    """The samples' dots do not add up to the gradient's: some use of these parameters was not tapped."""

    def __init__(self, message: str, parameters: list[nn.Parameter]) -> None:
        super().__init__(message)
        self.parameters = parameters


def check_sums(
    scorer: Scorer,
    microbatches: Sequence[Microbatch],
    directions: Directions,
    record: GradientRecord,
    scales: Mapping[nn.Parameter, float],
) -> None:
    """sum_i <g_i, D_w> = <G_w, D_w>, parameter by parameter: catches a use of a weight that no tap saw.

    Dots that are known only for several parameters together are checked together. Sums go over the samples of all
    processes, so that all of them raise or none does.

    Args:
        scorer: Whose step it is.
        microbatches: Of the step, with their dots.
        directions: Of the step.
        record: The gradients as backward left them.
        scales: By how much .grad has been multiplied since backward.

    Raises:
        UntappedUseError: Of all parameters whose dots do not add up.
        RuntimeError: The losses' shares do not add up to the gradient.
    """
    tapped, together = list(scorer.coverage.scored.values()), list(scorer.coverage.fallback.values())
    if any(microbatch.way == "forward" for microbatch in microbatches):
        tapped, together = [], tapped + together
    checked = {
        p: local(p.grad) for p in (*tapped, *together) if p.grad is not None and p in directions and scales.get(p, 1.0)
    }
    if not checked:
        return
    expected = gathered(dot(grad, d) for p, grad in checked.items() for d in directions[p])
    sizes = gathered(torch._foreach_norm([d for p in checked for d in directions[p]])).square()
    expected, sizes = scorer.ranks.over_elements(torch.stack([expected, sizes])).view(2, len(checked), -1)
    expected /= expected.new_tensor([[scales.get(p, 1.0)] for p in checked])
    # What other layers compute in 16 bits reaches parameters without a tap too.
    rounded = scorer.taps.rounded | (set(together) if scorer.taps.rounded else set())
    norms = {p: record.norm(p) for p in checked}
    # A gradient that is 0 but for rounding, as of the bias of attention's keys, is not the same twice.
    floor = 1e-2 * max(norms.values())
    allowed = expected.new_tensor([max(n, floor) * (1e-2 if p in rounded else 1e-4) for p, n in norms.items()])
    allowed = allowed[:, None] * sizes.sqrt()
    total, seen = torch.zeros_like(expected), torch.zeros_like(expected)
    for taken in (microbatch.weighted_dots for microbatch in microbatches):
        if rows := [row for row, p in enumerate(checked) if p in taken]:
            dots = torch.stack([taken[p] for p in checked if p in taken])
            total[rows] += dots.sum(1)
            seen[rows] += dots.abs().sum(1)
    total, seen = scorer.ranks.over_samples(torch.stack([total, seen]))
    # Samples that cancel leave a gradient smaller than the rounding of its terms.
    allowed += expected.new_tensor([1e-2 if p in rounded else 1e-5 for p in checked])[:, None] * seen
    wrong = ((total - expected).abs() > allowed) | ((seen == 0) & (expected != 0))
    alone, rest = (torch.tensor([p in group for p in checked]) for group in (set(tapped), set(together)))
    if missed := [(row, p) for row, p in enumerate(checked) if alone[row] and wrong[row].any()]:
        row = missed[0][0]
        raise UntappedUseError(
            f"{scorer.names[missed[0][1]]}: the samples' dots sum to {total[row].tolist()}, but the dot of the gradient"
            f" is {expected[row].tolist()}: some use of this parameter was not tapped (used outside its layer's"
            " forward, a backward outside shapley.step(), or a gradient left over from before the step)",
            [p for _, p in missed],
        )
    joint = [microbatch.joint.sum(0) for microbatch in microbatches if microbatch.joint is not None]
    if joint:
        summed, whole = scorer.ranks.over_samples(torch.stack(joint).sum(0)), expected[rest].sum(0)
        if bool(((summed - whole).abs() > 10 * allowed[rest].sum(0)).any()):
            raise RuntimeError(
                f"losses: the shares' derivatives sum to {summed.tolist()}, but the gradient's dot is "
                f"{whole.tolist()}: they are not shares of the loss that backward was called on"
            )


def unlike_the_oracle(scorer: Scorer, microbatches: Sequence[Microbatch], directions: Directions) -> list[nn.Parameter]:
    """The tapped parameters whose dots forward mode contradicts, found by halving those that are wrong together."""
    found: dict[nn.Parameter, None] = {}
    for microbatch in microbatches:

        def wrong(parameters: list[nn.Parameter], where: Microbatch = microbatch) -> list[nn.Parameter]:
            truth = scorer.derivatives(where, {p: directions[p] for p in parameters})
            dots = torch.stack([where.dots[p] for p in parameters])
            if bool(((dots.sum(0) - truth).abs() <= _allowed(scorer) * dots.abs().sum(0).amax(0)).all()):
                return []
            if len(parameters) == 1:
                return parameters
            half = len(parameters) // 2
            return wrong(parameters[:half]) + wrong(parameters[half:])

        if tapped := [p for p in microbatch.dots if p in directions]:
            found |= dict.fromkeys(wrong(tapped))
    return list(found)


def audited(scorer: Scorer, step: Step, directions: Directions) -> float | None:
    """The largest difference between dots and oracle, over the size of a sample's terms; None if not audited.

    Raises:
        AuditError: It is larger than rounding explains, and failures are not merely marked. Names the parameters.
    """
    if not scorer.audits(step):
        return None
    worst, where = 0.0, step.microbatches[0]
    for microbatch in step.microbatches:
        assert microbatch.oracle is not None
        parts = [*microbatch.dots.values(), *([] if microbatch.joint is None else [microbatch.joint])]
        size = sum(part.abs() for part in parts).amax(0).clamp_min(torch.finfo(torch.float64).tiny)  # type: ignore[union-attr]
        error = float(((sum(parts) - microbatch.oracle).abs() / size).max())
        if error > worst:
            worst, where = error, microbatch
    worst = scorer.ranks.largest(worst)  # so that all raise or none does
    if worst > _allowed(scorer) and scorer.settings.on_audit_failure == "raise":
        raise AuditError(
            f"step {step.number}: dots differ from the losses' own derivatives by {worst:.1e} of the size of their "
            f"terms, where rounding explains {_allowed(scorer):.0e}. {_by_parameter(scorer, where, directions)}"
        )
    return worst


def _allowed(scorer: Scorer) -> float:
    if scorer.taps.rounded or any(p.dtype.itemsize == 2 for p in scorer.names):
        return 2e-2
    return 1e-8 if all(p.dtype == torch.float64 for p in scorer.names) else 1e-4


def _by_parameter(scorer: Scorer, microbatch: Microbatch, directions: Directions) -> str:
    """The parameters whose dots are most wrong, each by an oracle of its own."""
    errors = {}
    for p, dots in microbatch.dots.items():
        truth = scorer.derivatives(microbatch, {p: directions[p]})
        errors[scorer.names[p]] = float((dots - truth).abs().max())
    first = sorted(errors, key=lambda name: -errors[name])[:5]
    return "Most by: " + ", ".join(f"{name} ({errors[name]:.1e})" for name in first)
