"""Labels per second of every backend of MATES, and how they rank documents beside real updates.

    python benchmarks/algorithms/bench_mates_labels.py                      # 256 documents at two checkpoints
    python benchmarks/algorithms/bench_mates_labels.py --width 128 --layers 4 --documents 512

A language model over bytes is trained on code and prose and stopped twice. At each checkpoint the same documents, of
both kinds, are labelled by real updates and by every other backend, in turns, a few documents at a time; the reference
is prose that was never trained on. Prints the speeds, their ratio to that of real updates, Spearman's correlation with
them and its 95 % interval.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ghostgram import data
from ghostgram.algorithms.mates.labels.backend import LabelBackend
from ghostgram.algorithms.mates.labels.exact import ExactLabels
from ghostgram.algorithms.mates.labels.first_order import AdamLabels, DotsLabels
from ghostgram.algorithms.mates.labels.forward import DifferenceLabels, JvpLabels
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.algorithms.mates.labels.task import Task, padded
from ghostgram.algorithms.mates.stats import bootstrap_interval, pearson, spearman

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))
import recording
from tiny_lm import TinyLM

BATCH, AT_ONCE, WARM_UP, CLIP = 16, 32, 20, 1.0
TRAINED_ON, SEED = 4000, 0
TASK = Task(lambda texts: padded([torch.tensor(list(text.encode())) for text in texts]))
SPEEDS = {"prepare_seconds": 2, "labels_per_second": 1, "ratio": 1}
"""Columns, with their decimals."""
BACKENDS = {
    "dots": DotsLabels,
    "dots, frozen": partial(DotsLabels, vocab="frozen"),
    "dots, drop": partial(DotsLabels, vocab="drop"),
    "adam": AdamLabels,
    "jvp": JvpLabels,
    "finite_difference": DifferenceLabels,
}


def texts(length: int, documents: int, examples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Windows of bytes (n, length) to train on, to label and to refer to."""
    found = []
    for name in ("python_code", "tech_docs"):
        training, held_out = data.split(data.load_text(name), 0.3, SEED)
        found.append(torch.tensor(data.windows(training, length, TRAINED_ON, SEED), dtype=torch.int64))
        found.append(torch.tensor(data.windows(held_out, length, documents // 2 + examples, SEED), dtype=torch.int64))
    pool = torch.stack([found[1][: documents // 2], found[3][: documents // 2]], 1).flatten(0, 1)
    return torch.cat([found[0], found[2]]), pool, found[3][documents // 2 :]


def targets(ids: Tensor) -> Tensor:
    """All but the first token of a window."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    return mask


def compared(model: nn.Module, view: OptimizerView, reference: Reference, pool: Tensor) -> list[dict[str, Any]]:
    """A row for every backend: its speed and its agreement with real updates, documents taken in turns."""
    made: dict[str, LabelBackend] = {"exact": ExactLabels(model, view, [reference], TASK, batch=len(reference.ids))}
    made |= {name: kind(model, view, [reference], TASK, batch=AT_ONCE) for name, kind in BACKENDS.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, backend in made.items():
        started = time.perf_counter()
        backend.prepare()
        rows[name] = {"backend": name, "prepare_seconds": time.perf_counter() - started}
        if name != "exact":  # whose first call needs nothing that the second has
            backend.influence(pool[:AT_ONCE], targets(pool[:AT_ONCE]))
    seconds = dict.fromkeys(made, 0.0)
    values: dict[str, list[Tensor]] = {name: [] for name in made}
    for some in pool.split(AT_ONCE):
        for name, backend in made.items():
            started = time.perf_counter()
            values[name].append(backend.influence(some, targets(some)).values[:, 0])
            seconds[name] += time.perf_counter() - started
    plain = "product of gradients"
    rows[plain] = {"backend": plain}
    values[plain] = products_of_gradients(model, reference, pool)
    exact = torch.cat(values["exact"]).numpy()
    for name, row in rows.items():
        mine = torch.cat(values[name]).numpy()
        low, high = bootstrap_interval(mine, exact)
        if name in seconds:
            row |= {"labels_per_second": len(pool) / seconds[name], "ratio": seconds["exact"] / seconds[name]}
        row |= {"spearman": spearman(mine, exact), "low": low, "high": high, "pearson": pearson(mine, exact)}
    return list(rows.values())


def products_of_gradients(model: nn.Module, reference: Reference, pool: Tensor) -> list[Tensor]:
    """<grad L_r, g_x> at theta, which knows nothing of the optimizer."""
    along = reference.gradient(model, TASK)
    found = []
    for some in pool.split(1):
        grads = torch.autograd.grad(TASK.losses(model, some, targets(some)).sum(), list(along))
        found.append(sum((a * g).sum() for a, g in zip(along.values(), grads, strict=True))[None].double())
    return found


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--tokens", type=int, default=48)
    options.add_argument("--documents", type=int, default=256)
    options.add_argument("--examples", type=int, default=256)
    options.add_argument("--rate", type=float, default=1e-3)
    options.add_argument("--steps", type=int, nargs="+", default=[300, 700])
    chosen = options.parse_args()

    torch.manual_seed(SEED)
    model = TinyLM(chosen.width, chosen.layers, 4, chosen.tokens)
    optimizer = torch.optim.AdamW(model.parameters(), chosen.rate, betas=(0.9, 0.95), weight_decay=0.1)
    training, pool, examples = texts(chosen.tokens, chosen.documents, chosen.examples)
    reference = Reference("prose", examples, targets(examples))
    console, rows = Console(width=120), []
    for step in range(1, max(chosen.steps) + 1):
        batch = training[torch.randint(len(training), (BATCH,))]
        optimizer.param_groups[0]["lr"] = chosen.rate * min(1, step / WARM_UP)
        TASK.losses(model, batch, targets(batch)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if step not in chosen.steps:
            continue
        view = OptimizerView(model, optimizer, clip=CLIP)
        found = compared(model, view, reference, pool)
        rows += [{"step": step, **vars(chosen), **row} for row in found]
        table = Table(title=f"step {step}: prose at {reference.loss(model, TASK):.3f} nats per byte")
        for column in ("backend", "prepare, s", "labels/s", "x exact", "Spearman", "95 %", "Pearson"):
            table.add_column(column, justify="left" if column == "backend" else "right")
        for row in found:
            speeds = [f"{row[k]:.{n}f}" if k in row else "" for k, n in SPEEDS.items()]
            agreement = [f"{row['spearman']:.4f}", f"{row['low']:.3f}..{row['high']:.3f}", f"{row['pearson']:.3f}"]
            table.add_row(row["backend"], *speeds, *agreement)
        console.print(table)
    recording.save("mates_labels", rows)


if __name__ == "__main__":
    main()
