"""Labels to first order by forward passes alone: how a document's loss changes along the references' directions.

The inner product `<w_r, g_x>` is the derivative of `l_x(theta + e w_r)` at e = 0. No layer need be known, nothing is
kept of the pass; but there is no gradient norm either, so that clipping is not seen: c_x counts as 1.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from numpy.typing import NDArray
from torch import Tensor

from ghostgram.algorithms.mates.labels.backend import Influence
from ghostgram.algorithms.mates.labels.expansion import Gradients, first_documents
from ghostgram.algorithms.mates.labels.linear import LinearLabels
from ghostgram.algorithms.mates.stats import spearman
from ghostgram.training.aside import evaluating
from ghostgram.training.oracle import central_difference, directional_derivatives

STEPS = (1e-3, 2.5e-4, 6.25e-5)
"""Lengths of a difference's step over the norm of the weights, in the order in which they are tried."""
AGREEMENT = 0.995
"""Rank correlation that the differences of a step and of its half must reach."""
CHECKED = 64
"""Documents of the references on which a step is tried."""


class ForwardLabels(LinearLabels):
    """What both have in common: derivatives along the directions. No forward pass knows a document's rows."""

    def _of_batch(self, ids: Tensor, mask: Tensor) -> Influence:
        with evaluating(self.model, self._parameters), self.view.ranks.aside():
            values, own_loss = self._derivatives(self._directions, ids, mask)
        none = torch.full((len(ids),), torch.nan, dtype=torch.float64)
        return Influence(values, none, none, own_loss)

    def _try(self, ids: Tensor, mask: Tensor) -> None:
        with evaluating(self.model, self._parameters), self.view.ranks.aside():
            self._derivatives({p: p.detach()[None] for p in self._parameters}, ids, mask)

    @abstractmethod
    def _derivatives(self, directions: Gradients, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(n, R) derivatives along directions (R, *shape) and (n,) own losses, float64 on the CPU."""


class JvpLabels(ForwardLabels):
    """(B) without clipping, `null_gain + <w_r, g_x>`, by forward-mode differentiation.

    Cost:
        6 P T FLOPs a document and reference for P weights and T tokens (`directional_derivatives`).

    Source:
        As for `DotsLabels`.
    """

    name = "jvp"

    def flops(self, tokens: int) -> float:
        """6 P T for each reference."""
        return 6.0 * self._weights * tokens * len(self.references)

    def _derivatives(self, directions: Gradients, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        own: list[Tensor] = []

        def losses() -> Tensor:
            found = self.task.losses(self.model, ids, mask)
            own.append(forward_ad.unpack_dual(found).primal.detach())  # type: ignore[no-untyped-call]
            return found

        return directional_derivatives(self.model, losses, directions), own[-1].double().cpu()


class DifferenceLabels(ForwardLabels):
    """(B) without clipping by a central difference, `null_gain + (l_x(theta + e w_r) - l_x(theta - e w_r)) / 2 e`.

    The step e is 1e-3 |theta| / |w_r|, or a quarter or a sixteenth of it: the longest whose labels of 64 documents rank
    them as those of half the step do. Weights of 16 bits seldom hold such a step. A document's own loss is the mean of
    its two losses.

    Cost:
        4 P T FLOPs a document and reference, two plain passes.

    Source:
        As for `DotsLabels`.
    """

    name = "finite_difference"
    _relative = STEPS[0]

    def prepare(self) -> None:
        """The references' gradients, and the step.

        Raises:
            RuntimeError: No step's labels agree with those of its half.
        """
        super().prepare()
        tried = []
        for relative in STEPS:
            whole, half = (self._checked(e) for e in (relative, relative / 2))
            lowest = min(spearman(a, b) for a, b in zip(whole.T, half.T, strict=True))
            if lowest >= AGREEMENT:
                self._relative = relative
                return
            tried.append(f"{lowest:.3f} at {relative:g} |theta|")
        raise RuntimeError(
            f"finite_difference: labels of {len(whole)} documents do not agree with those of half the step, rank "
            f"correlation {', '.join(tried)}; 16-bit weights do not hold such steps"
        )

    def flops(self, tokens: int) -> float:
        """4 P T for each reference."""
        return 4.0 * self._weights * tokens * len(self.references)

    def _checked(self, relative: float) -> NDArray[np.float64]:
        """(n, R) derivatives of the first documents, by steps of this length."""
        self._relative = relative
        documents = first_documents(self.references, CHECKED, self.batch)
        found: NDArray[np.float64] = torch.cat([self._of_batch(*each).values for each in documents]).numpy()
        return found

    def _derivatives(self, directions: Gradients, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        def losses() -> Tensor:
            return self.task.losses(self.model, ids, mask)

        found = [
            central_difference(self.model, losses, {p: D[r] for p, D in directions.items()}, self._relative)
            for r in range(len(next(iter(directions.values()))))
        ]
        return torch.stack([derivative for derivative, _ in found], 1), found[0][1]
