"""Do the signs of values depend on which held-out windows judged them, and does a rotating pool mend that?

    python benchmarks/algorithms/in_run_shapley/rotation.py --seed 0     # a minute or two
    python benchmarks/algorithms/in_run_shapley/rotation.py --table

One run is valued, to first order, by several validation sets at once. Each kind of set is there twice, cut from two
halves of the held-out windows that have none in common: what the two agree on is no accident of the draw. Fixed sets
read the same m windows at every step, rotating ones m others each time.
"""

from __future__ import annotations

import numpy as np
from common import BATCH, Learner, batches, corpus, interval, main, mean_loss, record, rows
from scipy import stats

import ghostgram as gg

DOCUMENTS, EPOCHS, LR, HALF = 1600, 2, 1e-3, 512
TAKES = (1, 8)
STEPS = DOCUMENTS * EPOCHS // BATCH


def run(seed: int) -> None:
    source = corpus(seed, DOCUMENTS, 2 * HALF)
    halves = source.validation.split(HALF)
    sets = {}
    for take in TAKES:
        for side, half in enumerate(halves):
            sets[f"fixed {take} {side}"] = mean_loss(half[:take])
            sets[f"rotating {take} {side}"] = gg.RotatingPool(
                lambda m, i, half=half: mean_loss(half[i])(m), HALF, take, seed
            )
    learner = Learner(seed, LR)
    shapley = gg.InRunShapley(learner.model, learner.optimizer, sets)
    for ids in batches(DOCUMENTS, STEPS, seed):
        learner.step(source.text[ids], shapley.step(ids=ids))
    log = shapley.step_log()
    ids, step = (log[name].to_numpy() for name in ("sample_id", "step"))
    for name in ("fixed", "rotating"):
        for take in TAKES:
            for stage, chosen in (("whole run", step >= 0), ("last epoch", step >= STEPS // 2)):
                phis = [log[f"phi_{name} {take} {side}"].to_numpy()[chosen].astype(float) for side in (0, 1)]
                one, other = (-np.bincount(ids[chosen], phi, DOCUMENTS) for phi in phis)
                corrupted = source.corruption != ""
                record(
                    "rotation", {"seed": seed, "set": name, "take": take, "stage": stage},
                    negative=float(((one < 0).mean() + (other < 0).mean()) / 2),
                    same_sign=float(((one < 0) == (other < 0)).mean()),
                    both_over_either=float(((one < 0) & (other < 0)).sum() / ((one < 0) | (other < 0)).sum()),
                    spearman=float(stats.spearmanr(one, other).statistic),
                    auroc=float(np.mean([auroc(value, corrupted) for value in (one, other)])),
                )  # fmt: skip


def auroc(value: np.ndarray, corrupted: np.ndarray) -> float:
    """How likely a corrupted document has a lower value than another one."""
    found = stats.mannwhitneyu(value[~corrupted], value[corrupted]).statistic
    return float(found / (corrupted.sum() * (~corrupted).sum()))


def table() -> None:
    kept = rows("rotation")
    print(f"{len({row['seed'] for row in kept})} seeds, {STEPS} steps of {BATCH} windows, mean and 95 % interval")
    print("| values of | validation | negative | same sign in both | negative in both / in either | Spearman | AUROC |")
    print("|---|---|---|---|---|---|---|")
    names = ("negative", "same_sign", "both_over_either", "spearman", "auroc")
    for stage in ("whole run", "last epoch"):
        for take in TAKES:
            for name in ("fixed", "rotating"):
                key = {"set": name, "take": take, "stage": stage}
                mine = [row for row in kept if all(row[field] == value for field, value in key.items())]
                numbers = ["{:.3f} +- {:.3f}".format(*interval(row[column] for row in mine)) for column in names]
                print("|", " | ".join([stage, f"{name}, {take}", *numbers]), "|")


if __name__ == "__main__":
    main(__doc__, run, table, seed={"type": int})
