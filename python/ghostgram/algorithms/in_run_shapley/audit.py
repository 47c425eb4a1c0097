"""Two checks of a step's dots: their sum, on every step, and each of them against an oracle, when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ghostgram.algorithms.in_run_shapley.directions import Directions, dot
from ghostgram.algorithms.in_run_shapley.scaling import GradientRecord, gathered
from ghostgram.taps.sharding import local

if TYPE_CHECKING:
    from ghostgram.algorithms.in_run_shapley.microbatch import Dots, Microbatch
    from ghostgram.algorithms.in_run_shapley.scoring import Scorer, Step


class AuditError(RuntimeError):
    """Dots of the taps differ from the derivative of the samples' losses."""


def check_sums(
    scorer: Scorer,
    dots: Sequence[Dots],
    joint: Sequence[Tensor | None],
    directions: Directions,
    record: GradientRecord,
    scales: Mapping[nn.Parameter, float],
) -> None:
    """sum_i <g_i, D_w> = <G_w, D_w>, parameter by parameter: catches a use of a weight that no tap saw.

    Dots that are known only for several parameters together are checked together. Sums go over the samples of all
    processes, so that all of them raise or none does.

    Args:
        scorer: Whose step it is.
        dots: Per microbatch.
        joint: Per microbatch (rows, K), or None.
        directions: Of the step.
        record: The gradients as backward left them.
        scales: By how much .grad has been multiplied since backward.
    """
    scored = [*scorer.coverage.scored.values(), *scorer.coverage.fallback.values()]
    checked = {p: local(p.grad) for p in scored if p.grad is not None and p in directions and scales.get(p, 1.0)}
    if not checked:
        return
    expected = gathered(dot(grad, d) for p, grad in checked.items() for d in directions[p])
    sizes = gathered(torch._foreach_norm([d for p in checked for d in directions[p]])).square()
    expected, sizes = scorer.ranks.over_elements(torch.stack([expected, sizes])).view(2, len(checked), -1)
    expected /= expected.new_tensor([[scales.get(p, 1.0)] for p in checked])
    rounded = scorer.taps.rounded
    norms = expected.new_tensor([record.norm(p) * (1e-2 if p in rounded else 1e-4) for p in checked])
    allowed = norms[:, None] * sizes.sqrt()
    tapped = {p for taken in dots for p in taken}
    total = torch.zeros_like(expected)
    for taken in dots:
        if rows := [row for row, p in enumerate(checked) if p in taken]:
            total[rows] += torch.stack([taken[p] for p in checked if p in taken]).sum(1)
    total = scorer.ranks.over_samples(total)
    found = [each for each in joint if each is not None]
    alone = [row for row, p in enumerate(checked) if p in tapped or not found]
    wrong = ((total - expected).abs() > allowed)[alone].any(1)
    if bool(wrong.any()):
        row = alone[int(wrong.nonzero()[0])]
        raise RuntimeError(
            f"{scorer.names[list(checked)[row]]}: the samples' dots sum to {total[row].tolist()}, but the dot of the"
            f" gradient is {expected[row].tolist()}: some use of this parameter was not tapped (used outside its "
            "layer's forward, a backward outside shapley.step(), or a gradient left over from before the step)"
        )
    if found:
        rest = [row for row in range(len(checked)) if row not in set(alone)]
        summed = scorer.ranks.over_samples(torch.stack([each.sum(0) for each in found]).sum(0))
        whole = expected[rest].sum(0)
        if bool(((summed - whole).abs() > 10 * allowed[rest].sum(0)).any()):
            raise RuntimeError(
                f"losses: the shares' derivatives sum to {summed.tolist()}, but the gradient's dot is "
                f"{whole.tolist()}: they are not shares of the loss that backward was called on"
            )


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
    if worst > _allowed(scorer) and not scorer.settings.mark_failures:
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
