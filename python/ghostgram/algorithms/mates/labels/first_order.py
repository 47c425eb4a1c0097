"""Labels to first order in the reference loss, from per-sample statistics of one backward over many documents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor, nn

from ghostgram.algorithms.mates.labels.backend import Influence
from ghostgram.algorithms.mates.labels.expansion import FirstOrderLabels, Gradients, joined
from ghostgram.algorithms.mates.labels.linear import LinearLabels
from ghostgram.ops import _torch
from ghostgram.taps import Taps, cover
from ghostgram.taps.session import NoSampleAxisError
from ghostgram.taps.statistics import Uses, distinct, gradients_at, statistics, uses_of
from ghostgram.taps.uses import DenseUse, MatrixUse, TableUse, Use
from ghostgram.training.aside import evaluating


class TappedLabels(FirstOrderLabels):
    """What the backends that read per-sample gradients have in common.

    One forward and backward of `sum_x l_x` over a batch of documents leaves, of every layer, its inputs a and output
    gradients b; the layers' weight gradients are not computed.
    """

    def _of_batch(self, ids: Tensor, mask: Tensor) -> Influence:
        try:
            uses, own_loss = self._gradients(ids, mask)
        except NoSampleAxisError:  # as of positions that are as many as documents
            if len(ids) == 1:
                raise
            return joined(self._of_batch(*half) for half in zip(ids.chunk(2), mask.chunk(2), strict=True))
        with torch.no_grad():
            values, norms = self._values(uses, ids, mask)
        return Influence(values, norms, self.view.clip_factors(norms), own_loss)

    @abstractmethod
    def _values(self, uses: Uses, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(n, R) influence without the null gain and (n,) gradient norms, float64 on the CPU."""

    def _gradients(self, ids: Tensor, mask: Tensor) -> tuple[Uses, Tensor]:
        """What one backward leaves of every document's gradient, and (n,) the documents' own losses."""
        with (
            evaluating(self.model, self._parameters),
            self.view.ranks.aside(),
            torch.enable_grad(),
            self._taps.samples(len(ids), None, gradients="later"),
        ):
            losses = self.task.losses(self.model, ids, mask)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        return uses_of(self._taps.kept()), losses.detach().double().cpu()

    def _try(self, ids: Tensor, mask: Tensor) -> None:
        self._gradients(ids, mask)

    @cached_property
    def _taps(self) -> Taps:
        return Taps(cover(self.model, self._parameters), self._parameters)


class DotsLabels(TappedLabels, LinearLabels):
    """(B), AdamW with its second moment frozen: `null_gain + c_x <w_r, g_x>`, `w_r = slope o grad L_r(theta_null)`.

    One pass over a layer's a and b gives the dots with all references' directions and the norm that clipping asks for.
    A vocabulary matrix has rows that no batch has touched for long, whose second moment has decayed: there the step is
    far from linear, and `vocab="adam_rows"` takes it as it is.

    Its arguments are those of `LinearLabels`; `batch` are the documents of one backward.

    Cost:
        6 P T FLOPs a document for P weights and T tokens, of any number of references; with "adam_rows" 2 T U d more
        for U distinct tokens.

    Source:
        arXiv 2406.06046 takes these labels by one real update and one evaluation each; the expansion is derived in
        docs/algorithms/mates.md.
    """

    name = "dots"
    vocabs = ("adam_rows", "frozen", "drop")
    shardable = True

    def flops(self, tokens: int) -> float:
        """6 P T."""
        return 6.0 * self._weights * tokens

    def _values(self, uses: Uses, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        squares, dots = statistics(uses, self._directions, len(self.references))
        norms = squares.sqrt()
        clip = self.view.clip_factors(norms)
        values = clip[:, None] * dots
        along = torch.zeros_like(values)  # of this process's rows, what the step is beyond its linear form
        own_tokens = mask.flip(1).cumsum(1).flip(1) > 0  # up to the last target: what follows is padding
        for p, (gradients, slope, (start, stop)) in self._by_row.items():
            if p in uses and start < stop:
                mine = own_tokens & (ids >= start) & (ids < stop)
                entries = distinct(ids, len(p), mine).to(p.device)
                g = _scaled(gradients_at(uses[p], entries), clip)
                inside = (entries - start).clamp_max(stop - start - 1)  # g is 0 at entries beyond the last
                beyond = self.view.delta(p, g, inside) + slope[inside] * g
                along += _dots(gradients, inside, beyond)
        return values - self.view.ranks.over_elements(along), norms


class AdamLabels(TappedLabels):
    """(A), AdamW's step as it is: `null_gain - <grad L_r(theta_null), theta_x - theta_null>`.

    A first pass over the layers' a and b gives the norms, and with them the clip factors; a second forms every
    document's gradient tile by tile, all uses of a weight added up, takes it through the step and multiplies with the
    references' gradients.

    Args:
        model: The model as it is trained.
        view: Its optimizer's step, AdamW's.
        references: The R references.
        task: What a document is to the model.
        batch: Documents of one backward.

    Cost:
        8 P T FLOPs a document for P weights and T tokens.

    Source:
        As for `DotsLabels`.
    """

    name = "adam"

    def why_not(self) -> str | None:
        """No moments of AdamW's, or a reason of all backends of this kind."""
        return self.view.why_no_moments() or super().why_not()

    def flops(self, tokens: int) -> float:
        """8 P T."""
        return 8.0 * self._weights * tokens

    def _take(self, gradients: Gradients) -> None:
        self._reference_gradients = gradients

    def _values(self, uses: Uses, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        norms = statistics(uses, {}, 0).squares.sqrt()
        clip = self.view.clip_factors(norms)
        each = [self._steps_along(p, of_parameter, clip) for p, of_parameter in uses.items()]
        return -torch.stack(each).sum(0), norms

    def _steps_along(self, p: nn.Parameter, uses: list[Use], clip: Tensor) -> Tensor:
        """(n, R) <grad L_r, delta(c_x g_x)> of one parameter, float64 on the CPU."""
        gradients = self._reference_gradients[p]
        products = [use for use in uses if isinstance(use, MatrixUse)]
        tables = [use for use in uses if isinstance(use, TableUse)]
        if len(products) + len(tables) == len(uses):
            total = torch.zeros(len(clip), len(gradients), dtype=torch.float64)
            for product in products:
                total += self._adam_dots(p, product.a, product.b, clip)
            if tables:  # only rows that were looked up differ from what the product alone gives
                entries = distinct(torch.cat([use.ids for use in tables], 1), len(p))
                inside = entries.clamp_max(len(p) - 1)
                steps = self.view.delta(p, _scaled(gradients_at(uses, entries), clip), inside)
                if products:
                    steps -= self.view.delta(p, _scaled(gradients_at(products, entries), clip), inside)
                total += _dots(gradients, inside, steps)
            return total
        if isinstance(dense := uses[0], DenseUse) and len(uses) == 1:
            flat = dense.gradients.flatten(1)[:, None]
            return self._adam_dots(p, flat, flat.new_ones(len(flat), 1, 1), clip)
        each = zip(torch.eye(uses[0].rows), clip.tolist(), strict=True)
        return self._dense(p, (factor * sum(use.gradient(one) for use in uses) for one, factor in each))

    def _adam_dots(self, p: nn.Parameter, a: Tensor, b: Tensor, clip: Tensor) -> Tensor:
        """(n, R) of a product's gradients b^T a, which have p's elements."""
        shape = (b.shape[-1], a.shape[-1])
        m, v = (moment.view(shape) for moment in self.view.moments(p))
        directions = self._reference_gradients[p].view(-1, *shape)
        scalars = list(self.view.scalars(p))
        dots: Tensor = _torch.call("adam_dots", a, b, clip.to(directions), m, v, directions, scalars, "auto")
        return dots.double().cpu()

    def _dense(self, p: nn.Parameter, clipped: Iterable[Tensor]) -> Tensor:
        """(n, R) of gradients of p that are formed one after another."""
        along = self._reference_gradients[p].flatten(1)
        return torch.stack([along @ self.view.delta(p, g).flatten() for g in clipped]).double().cpu()


def _scaled(g: Tensor, clip: Tensor) -> Tensor:
    """(n, ...) gradients, each clipped."""
    return g * clip.to(g).view(-1, *(1,) * (g.dim() - 1))


def _dots(gradients: Tensor, rows: Tensor, steps: Tensor) -> Tensor:
    """(n, R) float64 on the CPU: steps (n, U, ...) of some rows of a parameter, along gradients (R, *shape)."""
    return torch.stack([(G[rows] * steps).flatten(1).sum(1) for G in gradients], 1).double().cpu()
