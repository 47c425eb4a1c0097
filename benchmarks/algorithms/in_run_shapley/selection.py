"""What online selection is worth: a small language model trained on chosen halves of its batches, beside controls.

    python benchmarks/algorithms/in_run_shapley/selection.py --seed 0     # two minutes
    python benchmarks/algorithms/in_run_shapley/selection.py --table

The demo's corpus of five domains, a tenth of its windows spoiled, is to teach a byte model one of the validation sets:
prose, of which two domains are. Every way sees the same 32 candidates per step; all but "regular" train on 16 of them.
Measured is the loss on other prose than the choice goes by, at the end and half-way, where "regular" has trained on as
much text as the others have at the end; and how many of the windows trained on were spoiled, and how many were prose.
"""

from __future__ import annotations

from functools import partial

import common  # puts examples/ on the path
import in_run_shapley as demo
import numpy as np
import torch
from rich.console import Console
from tiny_lm import TinyLM, next_byte_loss

import ghostgram as gg

WIDTH, LAYERS, HEADS, LENGTH = 96, 2, 3, 96
STEPS, KEPT, TARGET = 240, 16, "prose"
WAYS = {
    "regular": None,
    "random": {"method": "random"},
    "top-k": {"method": "top-k"},
    "top-k, no tables": {"method": "top-k"},
    "greedy": {"method": "greedy"},
}
EXCLUDED = {"top-k, no tables": ["token.weight", "position.weight"]}


def train(way: str, corpus: demo.Corpus, seed: int) -> dict[str, float]:
    """Losses and shares of one run."""
    torch.manual_seed(seed)
    learner = demo.Learner(TinyLM(WIDTH, LAYERS, HEADS, LENGTH))
    text = torch.from_numpy(corpus.windows[:, :LENGTH]).long()
    held_out = corpus.validation[TARGET][:, :LENGTH]
    guide, test = held_out[::8], held_out[torch.arange(len(held_out)) % 8 != 0]
    shapley = gg.InRunShapley(
        learner.model, learner.optimizer, partial(next_byte_loss, text=guide), exclude=EXCLUDED.get(way, [])
    )
    spoiled = torch.from_numpy(corpus.corrupted)
    relevant = torch.tensor([domain in demo.VALIDATION[TARGET] for domain in corpus.domain])
    found, trained = {}, torch.zeros(3)

    def measure() -> float:
        with torch.no_grad():
            return float(next_byte_loss(learner.model, test))

    epochs = 1 + STEPS * demo.BATCH // len(text)
    whole = [ids for ids in demo.batches(len(text), epochs, seed) if len(ids) == demo.BATCH]
    for step, ids in enumerate(whole[:STEPS]):
        options = WAYS[way]
        if options is None:
            rows = torch.arange(len(ids))
            next_byte_loss(learner.model, text[ids]).backward()
        else:
            with shapley.select(ids, KEPT, seed=seed, **options) as chosen:
                next_byte_loss(learner.model, text[ids]).backward()
            rows = chosen.rows
        learner.update()
        trained += torch.tensor([len(rows), int(spoiled[ids[rows]].sum()), int(relevant[ids[rows]].sum())])
        if step + 1 == STEPS // 2:
            found["half-way"] = measure()
    shares = trained[1:] / trained[0]
    return found | {"end": measure(), "spoiled": float(shares[0]), TARGET: float(shares[1])}


def run(seed: int) -> None:
    demo.VALIDATION_WINDOWS = 64  # an eighth of them to choose by
    corpus = demo.gather(3000, "shuffle", seed, Console())
    for way in WAYS:
        common.record("selection", {"seed": seed, "way": way}, **train(way, corpus, seed))


def table() -> None:
    of = {(row["way"], row["seed"]): row for row in common.rows("selection")}
    print(f"{TARGET} in nats per byte, and shares of what was trained on; mean (range) over seeds")
    print(f"| | seeds | half-way | end | end - random's | spoiled | {TARGET} |")
    print("|---|---|---|---|---|---|---|")
    for way in WAYS:
        seeds = sorted(seed for each, seed in of if each == way)
        shown = [[of[way, seed][name] for seed in seeds] for name in ("half-way", "end", "spoiled", TARGET)]
        shown.insert(2, [of[way, seed]["end"] - of["random", seed]["end"] for seed in seeds])
        cells = [f"{np.mean(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in shown if c]
        print("|", " | ".join([way, ", ".join(map(str, seeds)), *cells]), "|")


if __name__ == "__main__":
    common.main(__doc__, run, table, seed={"type": int})
