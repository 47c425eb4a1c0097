"""What a validation gradient that serves for k steps costs in truth and saves in time.

    python benchmarks/algorithms/in_run_shapley/refresh.py --seed 0     # a minute or two
    python benchmarks/algorithms/in_run_shapley/refresh.py --table

Copies of one model train side by side on the same batches, order 1: plain, and scored with refresh = 1, 2, 4, 8. Times
are of blocks of 8 steps, which hold as many refreshes each; shown are medians of their ratios.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from common import BATCH, Learner, batches, corpus, interval, main, mean_loss, record, rows
from scipy import stats

import ghostgram as gg

DOCUMENTS, STEPS, LR, TAKE = 1200, 152, 1e-3, 8
REFRESH = (1, 2, 4, 8)
BLOCK = max(REFRESH)


def run(seed: int) -> None:
    source = corpus(seed, DOCUMENTS, TAKE)
    learners = {k: Learner(seed, LR) for k in (0, *REFRESH)}
    engines = {
        k: gg.InRunShapley(learner.model, learner.optimizer, mean_loss(source.validation), refresh=k)
        for k, learner in learners.items()
        if k
    }
    seconds = {k: np.zeros(STEPS) for k in learners}
    for number, ids in enumerate(batches(DOCUMENTS, STEPS, seed)):
        for k, learner in learners.items():
            started = time.perf_counter()
            learner.step(source.text[ids], engines[k].step(ids=ids) if k else None)
            seconds[k][number] = time.perf_counter() - started
    blocks = {k: times.reshape(-1, BLOCK).sum(1)[1:] for k, times in seconds.items()}  # the first one warms up
    logs = {k: engine.step_log() for k, engine in engines.items()}
    for stage, first in (("whole run", 0), ("second half", STEPS // 2)):
        values = {k: totals(log, first) for k, log in logs.items()}
        for k, engine in engines.items():
            turns = engine.ledger()["g_val_cosine"].to_numpy()[first:]
            turns = turns[np.isfinite(turns)]
            record(
                "refresh", {"seed": seed, "refresh": k, "stage": stage},
                spearman=float(stats.spearmanr(values[k], values[1]).statistic),
                pearson=float(np.corrcoef(values[k], values[1])[0, 1]),
                ratio_of_sums=float(values[k].sum() / values[1].sum()),
                same_sign=float(((values[k] < 0) == (values[1] < 0)).mean()),
                cosine=float(np.median(turns)) if len(turns) else None,
                time=float(np.median(blocks[k] / blocks[0])),
            )  # fmt: skip


def totals(log: Any, first: int) -> np.ndarray:
    """The value of every document over the steps from `first` on; 0 for one not seen there."""
    chosen = log["step"].to_numpy() >= first
    phi = log["phi_validation"].to_numpy()[chosen].astype(float)
    return -np.bincount(log["sample_id"].to_numpy()[chosen], phi, DOCUMENTS)


def table() -> None:
    found = rows("refresh")
    print(f"{len({row['seed'] for row in found})} seeds, {STEPS} steps of {BATCH} windows, mean and 95 % interval")
    names = ("spearman", "pearson", "ratio_of_sums", "same_sign", "time")
    print(
        "| values of | refresh | Spearman to k = 1 | Pearson | sum / its sum | same sign | step / plain step | cosine |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for stage in ("whole run", "second half"):
        for k in REFRESH:
            mine = [row for row in found if row["refresh"] == k and row["stage"] == stage]
            numbers = ["{:.3f} +- {:.3f}".format(*interval(row[name] for row in mine)) for name in names]
            cosines = [row["cosine"] for row in mine if row["cosine"] is not None]
            print("|", " | ".join([stage, str(k), *numbers, f"{np.mean(cosines):.3f}" if cosines else "-"]), "|")


if __name__ == "__main__":
    main(__doc__, run, table, seed={"type": int})
