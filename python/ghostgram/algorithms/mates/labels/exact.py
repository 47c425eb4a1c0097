"""Labels by definition: the optimizer's own step on one document, the reference losses there, and back to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ghostgram.algorithms.mates.labels.backend import Influence
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.algorithms.mates.labels.task import Task
from ghostgram.taps.sharding import whole
from ghostgram.training.aside import evaluating
from ghostgram.training.snapshot import Snapshot

CHECK_EVERY = 64
"""Documents after which the restored state is compared with the snapshot's, bit by bit."""


class ExactLabels:
    """Influence by the real step: -(L_r(theta_x) - L_r(theta)), theta_x from `optimizer.step()` on the batch {x}.

    A document's loss is the mean over its targets; its gradient is clipped as `view.clip` says, and the step takes the
    learning rates of `view.lrs`. A parameter that the document does not reach gets a gradient of zero, so that it moves
    by momentum and decay as it does for every other document. Nothing of it remains: weights, buffers, optimizer state,
    random states, modes and `.grad` are what they were, so that labels do not depend on the order of documents. The
    optimizer's hooks run as they do in training; what they keep elsewhere is not put back.

    Any optimizer will do. Under DistributedDataParallel each process takes its own documents; under `fully_shard` all
    take the same ones together, and share the references' examples.

    Args:
        model: The model that is probed, without DistributedDataParallel's wrapper.
        view: Its optimizer, clipping and learning rates.
        references: What losses are taken on.
        task: What documents are to the model. Autocast, where training uses it, belongs into its `logits`.
        train_mode: Whether documents are read in training mode, each with the same random states (dropout); the
            references never are.
        batch: Examples of a reference that a pass reads at once.

    Cost:
        A document of T tokens: 6 P T + 2 P R_t + 12 P FLOPs, P being the weights and R_t the references' positions.
        Memory: the snapshot, and what a step on one document takes.

    Source:
        arXiv 2406.06046, with the sign turned and the loss before the step subtracted.
    """

    name = "exact"

    def __init__(
        self,
        model: nn.Module,
        view: OptimizerView,
        references: Sequence[Reference],
        task: Task,
        *,
        train_mode: bool = False,
        batch: int = 32,
    ) -> None:
        self.model, self.view, self.references, self.task = model, view, list(references), task
        self.train_mode, self.batch = train_mode, batch
        self._parameters = list(view.names)
        self._shares = [self._share(r) for r in self.references]
        self._snapshot: Snapshot | None = None
        self._base: list[Tensor] = []

    def why_not(self) -> str | None:
        """None: there is always the step itself."""
        return None

    def prepare(self) -> None:
        """Takes the snapshot and the losses before any step; after training has moved on it must be called again."""
        self._snapshot = Snapshot(self.model, self.view.optimizer)
        with evaluating(self.model, self._parameters):
            self._base = self._sums()
            try:
                self._step()
                null = self._sums()
            finally:
                self._snapshot.restore()
        self.base_loss = self._means(self._base)
        """(R,) float64, L_r(theta)."""
        self.null_gain = self.base_loss - self._means(null)
        """(R,) float64, L_r(theta) - L_r(theta_null), by the real step on a gradient of zero."""

    def influence(self, ids: Tensor, mask: Tensor) -> Influence:
        """See `LabelBackend`; `probe` without the examples."""
        return self.probe(ids, mask)[0]

    def probe(self, ids: Tensor, mask: Tensor) -> tuple[Influence, list[Tensor]]:
        """The influence of documents, and which examples it is made of.

        Args:
            ids: (n, T) int64.
            mask: (n, T) bool, as `task.encode` gives them.

        Returns:
            The influence, and for every reference (n, N_r) float64: by how many nats, summed over its targets, each
            example's loss falls. Their sum over examples, over `reference.tokens`, is the influence.

        Raises:
            RuntimeError: Weights or state are not those that `prepare` found, before the first document or after some.
        """
        if self._snapshot is None:
            raise RuntimeError("prepare() must be called before documents are labelled")
        self._snapshot.check()
        rows: list[tuple[float, float, float]] = []
        gains: list[list[Tensor]] = [[] for _ in self.references]
        with evaluating(self.model, self._parameters):
            for i in range(len(ids)):
                try:
                    own, norm, clip = self._update(ids[i : i + 1], mask[i : i + 1])
                    after = self._sums()
                finally:
                    self._snapshot.restore()
                rows.append((own, norm, clip))
                for gain, before, now in zip(gains, self._base, after, strict=True):
                    gain.append(before - now)
                if (i + 1) % CHECK_EVERY == 0 or i + 1 == len(ids):
                    self._snapshot.check()
        own_loss, norms, clips = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
        examples = [torch.stack(gain) for gain in gains]
        tokens = torch.tensor([r.tokens for r in self.references], dtype=torch.float64)
        values = torch.stack([each.sum(1) for each in examples], 1) / tokens
        return Influence(values, norms, clips, own_loss), examples

    def flops(self, tokens: int) -> float:
        """See the class."""
        weights = sum(p.numel() for p in self.model.parameters())
        return weights * (6.0 * tokens + 2.0 * sum(r.positions for r in self.references) + 12.0)

    def _update(self, ids: Tensor, mask: Tensor) -> tuple[float, float, float]:
        """Steps on one document; its loss, the norm of its gradient and the factor that clipping gave it."""
        self.model.train(self.train_mode)
        with self.view.ranks.aside(), torch.enable_grad():
            loss = self.task.losses(self.model, ids, mask).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        self.model.eval()
        norm = whole(nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]))
        if self.view.clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.view.clip, norm)
        clip = float(self.view.clip_factors(norm))
        self._step()
        return float(loss.detach()), float(norm), clip

    def _step(self) -> None:
        """The optimizer's step on what `.grad` holds, which is nothing afterwards."""
        self._fill()
        for group, lr in zip(self.view.optimizer.param_groups, self.view.lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self.view.optimizer.step()
        for p in self._parameters:
            p.grad = None

    def _fill(self) -> None:
        """Zero where there is no gradient."""
        for p in self._parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)

    def _sums(self) -> list[Tensor]:
        """Every reference's losses by example, at the weights as they are."""
        with self.view.ranks.aside():
            sums = [share.sums(self.model, self.task, self.batch) for share in self._shares]
        if not self.view.ranks.sharded:
            return sums
        return [self._joined(r, each) for r, each in zip(self.references, sums, strict=True)]

    def _share(self, reference: Reference) -> Reference:
        """The examples that this process reads: every one's turn, as many on each, the first ones again if need be."""
        ranks = self.view.ranks
        if not ranks.sharded:
            return reference
        turns = torch.arange(ranks.rank, ranks.rank + len(reference.ids) + -len(reference.ids) % ranks.size, ranks.size)
        mine = turns % len(reference.ids)
        return Reference(reference.name, reference.ids[mine], reference.mask[mine])

    def _joined(self, reference: Reference, sums: Tensor) -> Tensor:
        """Every example's loss, from what each process has read."""
        ranks, examples = self.view.ranks, len(reference.ids)
        every = torch.zeros(len(sums) * ranks.size, dtype=torch.float64)
        every[ranks.rank :: ranks.size] = sums
        return ranks.over_samples(every)[:examples]

    def _means(self, sums: list[Tensor]) -> Tensor:
        pairs = zip(self.references, sums, strict=True)
        return torch.tensor([r.mean(each) for r, each in pairs], dtype=torch.float64)
