"""Online selection: samples are scored, chosen and trained on in one forward and backward.

The backward leaves the weight gradients out and keeps what they are made of, (a, b). Once every layer has been scored
the samples are chosen, and the weight gradients are summed over those alone. GREATS (NeurIPS 2024), whose choice
`greedy` makes, runs a second forward and backward over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ghostgram.algorithms.in_run_shapley.directions import Directions, dot
from ghostgram.algorithms.in_run_shapley.validation import Gradient
from ghostgram.taps import Taps, UncoveredParameterError, cover
from ghostgram.taps.uses import Kept, Scale, accumulate, gram
from ghostgram.training.gathered import gathered
from ghostgram.training.linearize import linearize

if TYPE_CHECKING:
    from ghostgram.algorithms.in_run_shapley.microbatch import Microbatch
    from ghostgram.algorithms.in_run_shapley.scoring import Scorer


# Choosers --------------------------------------------------------------------------------------------------------


def top_k(values: Tensor, k: int) -> Tensor:
    """The k largest of values (B,), best first, the earlier one of equals: (k,) int64."""
    _check_count(k, len(values))
    return values.argsort(descending=True, stable=True)[:k]


def threshold(values: Tensor, least: float) -> Tensor:
    """Those of values (B,) that exceed `least`, (n,) int64; none is possible."""
    return (values > least).nonzero()[:, 0]


def greedy(values: Tensor, gram: Tensor, k: int, curvature: float) -> Tensor:
    """GREATS' greedy choice: one after another, the sample that adds most to the second-order utility of those chosen.

    With steps delta_i = -P * g_i and H ~ lambda I, adding i to the chosen S lowers the validation loss by

        <g_i, P * g_val> - lambda <delta_i, sum_{j in S} delta_j> - lambda / 2 <delta_i, delta_i>.

    Args:
        values: (B,) <g_i, P * g_val>, the first-order values.
        gram: (B, B) <delta_i, delta_j>.
        k: How many to choose.
        curvature: lambda; 0 gives `top_k`.

    Returns:
        (k,) int64, in the order of choice.

    Source:
        GREATS (NeurIPS 2024), whose H is the identity.
    """
    _check_count(k, len(values))
    left = values - curvature / 2 * gram.diagonal()
    chosen: list[int] = []
    for _ in range(k):
        chosen.append(int(left.argmax()))
        left = left - curvature * gram[:, chosen[-1]]
        left[chosen] = -torch.inf
    return torch.tensor(chosen)


def at_random(count: int, k: int, seed: int) -> Tensor:
    """k of `count`, without looking: the control that any choice must beat; (k,) int64."""
    _check_count(k, count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:k]


def _check_count(k: int, count: int) -> None:
    if not 1 <= k <= count:
        raise ValueError(f"keep: expected 1 to {count}, the number of candidates, got {k}")


# What a choice is made of, and what comes of it ------------------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """What a choice can go by; all on the CPU, in float64."""

    values: Tensor
    """(B, K) first-order values <g_i, P * grad l_k> of the samples at weight 1: positive = lowers the loss of set k."""
    _gram: Callable[[], Tensor]

    @cached_property
    def gram(self) -> Tensor:
        """(B, B) inner products of the samples' steps, <P * g_i, P * g_j>, computed when first asked for."""
        return self._gram()


Choose = Callable[[Candidates], Tensor]
"""From candidates to the rows chosen, (n,) int64, or to a weight for each of them, (B,) floating point."""


def chooser(
    method: str | Choose, keep: int | None, least: float, curvature: float, draw: tuple[int, ...], count: int
) -> Choose:
    """What `InRunShapley.select` was asked for, as a function of the candidates; `draw` makes random draws differ."""
    needs_keep = method in ("top-k", "greedy", "random")
    if not (callable(method) or needs_keep or method == "threshold"):
        raise ValueError(f"method: expected 'top-k', 'greedy', 'threshold', 'random' or a callable, got {method!r}")
    if needs_keep != (keep is not None):
        raise ValueError(f"keep: expected {'a number' if needs_keep else 'None'} for method={method!r}, got {keep}")
    if callable(method):
        return method
    if keep is None:
        return lambda candidates: threshold(candidates.values.mean(1), least)
    k = keep
    _check_count(k, count)
    if method == "random":
        return lambda candidates: at_random(count, k, hash(draw) % 2**63)
    if method == "greedy" and curvature:
        return lambda candidates: greedy(candidates.values.mean(1), candidates.gram, k, curvature)
    return lambda candidates: top_k(candidates.values.mean(1), k)


@dataclass
class Chosen:
    """The outcome of a selection, once its block is left."""

    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    """(B,) float64: what each sample's gradient was multiplied by; 0 for those left out."""
    values: Tensor | None = None
    """(B, K) float64 first-order values of all candidates at weight 1, before clipping; None where all were taken
    because nothing could be scored yet (Adam's first step)."""

    @property
    def rows(self) -> Tensor:
        """The samples trained on, (n,) int64, in the batch's order."""
        return self.weights.nonzero()[:, 0]


@dataclass(frozen=True)
class Request:
    """How one backward's samples are to be chosen."""

    choose: Choose
    rescale: bool
    loss_scale: float
    chosen: Chosen = field(default_factory=Chosen)


class StepCurvature:
    """lambda of H ~ lambda I: the mean validation loss' curvature along the last step u, u^T H u / |u|^2.

    Measured as <u, g_val(w + u) - g_val(w)> / |u|^2 between two validation passes, which training makes anyway: it
    takes a copy of the weights and one of the gradient. Not below 0, and 0 until two passes have been seen.
    """

    def __init__(self) -> None:
        self.value = 0.0
        self._before: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}

    def see(self, gradients: list[Gradient]) -> None:
        """Takes note of the sets' gradients at the current weights."""
        now = {p: torch.stack([g[p] for g in gradients]).mean(0) for p in gradients[0]}
        if self._before:
            steps = {p: p.detach() - w for p, (w, _) in self._before.items()}
            turned = gathered(dot(now[p] - g, steps[p]) for p, (_, g) in self._before.items()).sum()
            length = gathered(dot(u, u) for u in steps.values()).sum()
            if length > 0:
                self.value = max(0.0, float(turned / length))
        self._before = {p: (p.detach().clone(), g) for p, g in now.items()}


class OnlineSelection:
    """Runs the backwards whose samples are chosen on the way.

    Args:
        scorer: Whose steps they belong to.

    Raises:
        UncoveredParameterError: A trainable parameter has no tap: nobody's share of its gradient could be left out.
    """

    def __init__(self, scorer: Scorer) -> None:
        if scorer.ranks.size > 1 or scorer.ranks.sharded:
            raise RuntimeError(
                f"select: expected one process with the whole model and batch, got {scorer.ranks.size}"
                f"{', with a sharded model' if scorer.ranks.sharded else ''}"
            )
        try:
            coverage = cover(scorer.model, scorer.groups)
        except UncoveredParameterError as error:
            problem = str(error).partition(". Freeze them")[0]
            raise UncoveredParameterError(f"{problem}: no sample's share of their gradients can be left out") from None
        self._scorer = scorer
        self._scored = set(scorer.coverage.scored.values())
        self._taps = Taps(coverage, list(self._scored))

    @contextmanager
    def around(self, microbatch: Microbatch, directions: Directions, request: Request) -> Iterator[None]:
        """The backward inside is scored; then samples are chosen, and .grad gets the weighted sum of their gradients.

        A batch whose values are not finite is taken whole, so that a GradScaler sees what has happened.
        """
        with self._taps.samples(microbatch.batch, directions, gradients="later"):
            yield
        microbatch.dots, kept = self._taps.dots(), self._taps.kept()
        self._scorer.taps.rounded |= self._taps.rounded
        microbatch.fetch()
        values = torch.stack(list(microbatch.dots.values())).sum(0) / request.loss_scale
        if bool(values.isfinite().all()):
            candidates = Candidates(values, lambda: self._gram(kept) / request.loss_scale**2)
            weights = _weights(request.choose(candidates), len(values), request.rescale)
        else:
            weights = torch.ones(len(values), dtype=torch.float64)
        accumulate(kept, weights)
        microbatch.weights = request.chosen.weights = weights
        request.chosen.values = values

    def _gram(self, kept: Kept) -> Tensor:
        """<P * g_i, P * g_j> over the parameters scored."""

        def scale(parameter: nn.Parameter) -> Scale:
            group = self._scorer.groups[parameter]
            P = linearize(self._scorer.optimizer, group, [parameter])[0].P
            return float(P) if P.numel() == 1 else P

        return gram([(p, use) for p, use in kept if p in self._scored], scale)


def _weights(choice: Tensor, count: int, rescale: bool) -> Tensor:
    """(B,) float64 weights from what a chooser has returned."""
    if choice.is_floating_point():
        if choice.shape != (count,) or not bool(choice.isfinite().all()):
            raise ValueError(f"method: expected {count} finite weights, one for each candidate, got {choice}")
        return choice.detach().double().cpu()
    rows = choice.tolist()
    if choice.dim() != 1 or len(set(rows)) != len(rows) or not all(0 <= row < count for row in rows):
        raise ValueError(f"method: expected different rows of 0 to {count - 1}, got {choice}")
    weights = torch.zeros(count, dtype=torch.float64)
    weights[rows] = count / len(rows) if rescale and rows else 1.0
    return weights
