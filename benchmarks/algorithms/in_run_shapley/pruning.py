"""Does dropping the documents of negative value make a better model of the same number of tokens?

    python benchmarks/algorithms/in_run_shapley/pruning.py --seed 0     # a minute or two; seeds may run side by side
    python benchmarks/algorithms/in_run_shapley/pruning.py --table

One run values every document (order 2) against a rotating pool of held-out windows. Then a new
model is trained, from the same start and for as many steps, on what each way of pruning leaves: it meets the documents
left more often. It is judged on held-out windows that neither training nor valuation has seen. The learning rate falls
to a tenth over the second half of a run: without that, where a run happens to end decides more than what it was fed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import (
    BATCH,
    Corpus,
    Learner,
    batches,
    corpus,
    interval,
    main,
    mean_loss,
    record,
    rows,
    save_arrays,
    window_losses,
)

import ghostgram as gg
from ghostgram import data

DOCUMENTS, EPOCHS, LR = 1600, 3, 1e-3
POOL, TAKE = 1024, 8
STEPS = DOCUMENTS * EPOCHS // BATCH
NONE, ORACLE = "nothing", "corrupted documents"
BY_VALUE, BY_LATE_VALUE = "value < 0", "value < 0 in the last epoch"
RANDOM, BY_LOSS = "random", "highest training loss"


@dataclass
class Scores:
    """What the scored run knows of every document, and the loss its model ended with."""

    value: np.ndarray
    late_value: np.ndarray
    late_loss: np.ndarray  # training loss when last seen
    final: np.ndarray

    def removals(self, corrupted: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Arm -> whether each document is removed. Random and loss remove as many as values do."""
        removed = self.value < 0
        count = int(removed.sum())
        drawn = np.zeros_like(removed)
        drawn[np.random.default_rng(seed).choice(len(drawn), count, replace=False)] = True
        highest = np.zeros_like(removed)
        highest[np.argsort(-self.late_loss)[:count]] = True
        return {
            BY_VALUE: removed, RANDOM: drawn, BY_LOSS: highest, ORACLE: corrupted,
            BY_LATE_VALUE: self.late_value < 0,
        }  # fmt: skip


def scored(seed: int, source: Corpus) -> Scores:
    """Values of the whole run, by documents; kept in the cache."""
    cached = data.cache_folder() / f"experiments-pruning-{seed}-{DOCUMENTS}-{EPOCHS}-{LR}.npz"
    if not cached.exists():
        learner = Learner(seed, LR, cooled=STEPS)
        pool = gg.RotatingPool(lambda m, i: mean_loss(source.validation[i])(m), POOL, TAKE, seed)
        shapley = gg.InRunShapley(learner.model, learner.optimizer, {"pool": pool}, order=2)
        late_loss = np.zeros(DOCUMENTS)
        for ids in batches(DOCUMENTS, STEPS, seed):
            late_loss[ids] = learner.step(source.text[ids], shapley.step(ids=ids))
        log = shapley.step_log()
        ids, step = (log[name].to_numpy() for name in ("sample_id", "step"))
        phi = log["phi_pool"].to_numpy().astype(float)
        total = lambda chosen: -np.bincount(ids[chosen], phi[chosen], DOCUMENTS)  # noqa: E731
        whole, late = step >= 0, step >= STEPS * (EPOCHS - 1) // EPOCHS
        save_arrays(
            cached, value=total(whole), late_value=total(late), late_loss=late_loss, final=judged(learner, source)
        )
    return Scores(**np.load(cached))


@torch.no_grad()
def judged(learner: Learner, source: Corpus) -> np.ndarray:
    """Losses on the test windows."""
    return torch.cat([window_losses(learner.model, part) for part in source.test.split(BATCH)]).numpy()


def trained(seed: int, source: Corpus, removed: np.ndarray) -> np.ndarray:
    """Test losses of a model trained from scratch on what is left."""
    learner = Learner(seed, LR, cooled=STEPS)
    for ids in batches(DOCUMENTS, STEPS, seed, ~removed):
        learner.step(source.text[ids])
    return judged(learner, source)


def run(seed: int) -> None:
    source = corpus(seed, DOCUMENTS, POOL)
    scores = scored(seed, source)
    corrupted = source.corruption != ""
    removals = {NONE: np.zeros(DOCUMENTS, bool)} | scores.removals(corrupted, seed)
    done = {row["arm"] for row in rows("pruning") if row["seed"] == seed}
    for arm, removed in removals.items():
        if arm in done:
            continue
        losses = scores.final if arm == NONE else trained(seed, source, removed)
        found = {kind: int((removed & (source.corruption == kind)).sum()) for kind in ("shuffle", "noise")}
        there = {f"of_{kind}": int((source.corruption == kind).sum()) for kind in found}
        record("pruning", {"seed": seed, "arm": arm}, loss=losses.mean().item(), removed=int(removed.sum()),
               **found, **there)  # fmt: skip
        print(f"seed {seed}, {arm}: loss {losses.mean():.4f}, removed {removed.mean():.1%}, {found}", flush=True)


def table() -> None:
    kept = {(row["seed"], row["arm"]): row for row in rows("pruning")}
    arms = list(dict.fromkeys(arm for _, arm in kept))
    seeds = [seed for seed in sorted({seed for seed, _ in kept}) if all((seed, arm) in kept for arm in arms)]
    print(f"{len(seeds)} seeds, {STEPS} steps each; mean and 95 % interval over seeds")
    print("| removed | share | corrupted | shuffled found | noise found | test loss | - nothing's | - random's |")
    print("|---|---|---|---|---|---|---|---|")
    for arm in arms:
        mine = [kept[seed, arm] for seed in seeds]

        def share(part: str, whole: str, mine: list = mine) -> str:
            counts = [sum(row[name] for row in mine for name in names.split()) for names in (part, whole)]
            return f"{counts[0] / counts[1]:.0%}" if counts[1] else "-"

        columns = [f"{np.mean([row['removed'] for row in mine]) / DOCUMENTS:.1%}", share("shuffle noise", "removed"),
                   share("shuffle", "of_shuffle"), share("noise", "of_noise")]  # fmt: skip
        columns.append("{:.4f} +- {:.4f}".format(*interval(row["loss"] for row in mine)))
        for other in (NONE, RANDOM):
            paired = [row["loss"] - kept[row["seed"], other]["loss"] for row in mine]
            columns.append("-" if arm == other else "{:+.4f} +- {:.4f}".format(*interval(paired)))
        print("|", " | ".join([arm, *columns]), "|")


if __name__ == "__main__":
    main(__doc__, run, table, seed={"type": int})
