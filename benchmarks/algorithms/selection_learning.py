"""What online selection is worth: a small language model trained on chosen halves of its batches, beside controls.

    python benchmarks/algorithms/selection_learning.py --seeds 0 1 2

The demo's corpus of five domains, a tenth of its windows spoiled, is to teach a byte model one of the validation sets:
prose, of which two domains are. Every way sees the same 32 candidates per step; all but "regular" train on 16 of them.
Printed is the loss on other prose than the choice goes by, at the end and half-way, where "regular" has trained on as
much text as the others have at the end; and how many of the windows trained on were spoiled, and how many were prose.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import ghostgram as gg

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import in_run_shapley as demo
from tiny_lm import TinyLM, next_byte_loss

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    console = Console()
    demo.VALIDATION_WINDOWS = 64  # an eighth of them to choose by
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for seed in seeds:
        corpus = demo.gather(3000, "shuffle", seed, console)
        for way in WAYS:
            found[way].append(train(way, corpus, seed))
    table = Table(title=f"loss on {TARGET} in nats per byte, and shares trained on; mean (range) over seeds {seeds}")
    table.add_column("way")
    for name in next(iter(found.values()))[0]:
        table.add_column(name, justify="right")
    for way, runs in found.items():
        columns = [[run[name] for run in runs] for name in runs[0]]
        table.add_row(way, *(f"{statistics.mean(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in columns))
    console.print(table)


if __name__ == "__main__":
    main()
