"""Values every document of one training run of a small language model, and shows what the values know.

    python examples/in_run_shapley.py --out demo-output

Real text of several domains is cut into windows, a tenth of them is spoiled, and a byte-level language model is
trained on all. While it trains, every window gets its In-Run Shapley value for two held-out validation sets. The
page `report.html` then shows which domain taught the model what, whether the spoiled windows stand out, and, step by
step, whether the values add up to the measured change of the validation losses.
"""

import argparse
import copy
import csv
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tiny_lm import TinyLM, next_byte_loss
from torch import Tensor, nn

import ghostgram as gg
from ghostgram import data
from ghostgram.report.html import write_report
from ghostgram.report.summary import Summary

WINDOW, BATCH = 192, 32
WIDTH, LAYERS, HEADS = 160, 3, 5
LEARNING_RATE, WARM_UP, MAX_NORM = 5e-4, 20, 1.0
DOMAINS = ("python_code", "tech_docs", "cpp_headers", "shakespeare", "kjv")
VALIDATION = {"prose": ("shakespeare", "kjv"), "code": ("python_code", "cpp_headers")}
VALIDATION_WINDOWS = 8  # per set: 16 beside a batch of 32
HELD_OUT = 0.1
TWIN_EVERY = 6  # a plain step of an identical model is timed beside every sixth step


@dataclass
class Corpus:
    """Training windows with what is known of each, and the validation windows of each set."""

    windows: np.ndarray
    domain: np.ndarray
    corrupted: np.ndarray
    validation: dict[str, Tensor]


@dataclass
class Learner:
    """A model with its optimizer and learning-rate schedule."""

    model: nn.Module
    optimizer: torch.optim.Optimizer = field(init=False)
    schedule: torch.optim.lr_scheduler.LambdaLR = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1, (step + 1) / WARM_UP))

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()


def gather(count: int, corruption: str, seed: int, console: Console) -> Corpus:
    """Cuts `count` windows of all domains to be had, in equal parts, and holds out documents for validation."""
    train, held_out = {}, {}
    for name in DOMAINS:
        try:
            train[name], held_out[name] = data.split(data.load_text(name), HELD_OUT, seed)
        except data.DomainUnavailable as why:
            console.print(f"[yellow]going on without {name}:[/] {why}")
    if len(train) < 3:
        raise SystemExit(f"only {len(train)} text domains can be had; the demo needs three")
    share = count // len(train)
    clean = np.concatenate([data.windows(documents, WINDOW, share, seed) for documents in train.values()])
    windows, corrupted = data.corrupt(clean, 0.1, seed, corruption)
    seen = [document for documents in train.values() for document in documents]
    validation = {}
    for set_name, members in VALIDATION.items():
        if have := [name for name in members if name in train]:
            each = VALIDATION_WINDOWS // len(have)
            cut = [data.windows(held_out[name], WINDOW, each, seed, absent_from=seen) for name in have]
            validation[set_name] = torch.from_numpy(np.concatenate(cut)).long()
    return Corpus(windows, np.repeat(list(train), share), corrupted, validation)


def batches(count: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Ids of every batch: each epoch visits all documents once, in a new order."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(BATCH)


def train(corpus: Corpus, epochs: int, seed: int, log: Path, console: Console) -> tuple[gg.InRunShapley, dict]:
    """Trains once, valuing every document; beside some steps a twin without valuation is timed at the same work."""
    torch.manual_seed(seed)
    valued = Learner(TinyLM(WIDTH, LAYERS, HEADS, WINDOW))
    twin = Learner(copy.deepcopy(valued.model))
    text = torch.from_numpy(corpus.windows).long()
    validation = {name: partial(next_byte_loss, text=windows) for name, windows in corpus.validation.items()}
    shapley = gg.InRunShapley(valued.model, valued.optimizer, validation, order=1, log=log)
    seconds: dict[str, list[float]] = {"instrumented": [], "plain": []}
    schedule = list(batches(len(text), epochs, seed))
    columns = (
        TextColumn("[bold]training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.1f} steps/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(schedule), loss=float("nan"), rate=0.0)
        for step, ids in enumerate(schedule):
            started = time.perf_counter()
            with shapley.step(ids=ids):
                loss = next_byte_loss(valued.model, text[ids])
                loss.backward()
            valued.update()
            seconds["instrumented"].append(time.perf_counter() - started)
            if step % TWIN_EVERY == 0:
                started = time.perf_counter()
                next_byte_loss(twin.model, text[ids]).backward()
                twin.update()
                seconds["plain"].append(time.perf_counter() - started)
            rate = 1 / statistics.median(seconds["instrumented"])
            progress.update(task, advance=1, loss=loss.item(), rate=rate)
    shapley.close()
    return shapley, seconds


def findings(summary: Summary) -> Table:
    table = Table(
        title="In-Run Data Shapley: value = -phi, positive = lowered the validation loss", title_justify="left"
    )
    table.add_column("finding")
    table.add_column("number", justify="right")
    table.add_row("corrupted documents found by low value, AUROC", f"{summary.detection.auroc:.3f}")
    table.add_row("  by values of the last quarter of the run", f"{summary.detection_by_stage[-1]:.3f}")
    for name, series in summary.ledger.items():
        table.add_row(f"loss on {name}, measured change (nats)", f"{series.measured.sum():+.3f}")
        table.add_row(f"loss on {name}, predicted change", f"{series.predicted.sum():+.3f}")
    table.add_row("step time / plain step time (medians)", f"{summary.step_time_ratio:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder of the log and the report")
    parser.add_argument("--documents", type=int, default=3000, help="training windows of 192 bytes")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--corruption", choices=("shuffle", "noise"), default="shuffle")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    console, started = Console(), time.perf_counter()
    shutil.rmtree(options.out / "values", ignore_errors=True)  # of an earlier demo; a log is never overwritten silently
    corpus = gather(options.documents, options.corruption, options.seed, console)
    shapley, seconds = train(corpus, options.epochs, options.seed, options.out / "values", console)
    with (options.out / "sources.csv").open("w", newline="") as file:  # for `ghostgram values`
        sources = np.where(corpus.corrupted, "corrupted", corpus.domain)
        csv.writer(file).writerows([("id", "source"), *enumerate(sources)])
    parameters = sum(parameter.numel() for parameter in TinyLM(WIDTH, LAYERS, HEADS, WINDOW).parameters())
    summary = write_report(
        options.out / "report.html",
        title="In-Run Data Shapley of a small language model",
        values=shapley.values(),
        steps=shapley.step_log(),
        ledger=shapley.ledger(),
        documents={
            "id": np.arange(len(corpus.windows)),
            "domain": corpus.domain,
            "text": [window.tobytes() for window in corpus.windows],
        },
        corrupted=corpus.corrupted,
        timings=seconds,
        settings={
            "model": f"decoder-only byte model, {LAYERS} layers, width {WIDTH}, {parameters / 1e6:.2f} M parameters",
            "training": f"{len(corpus.windows):,} windows of {WINDOW} bytes, {options.epochs} epochs, batch {BATCH}",
            "optimizer": f"AdamW, lr {LEARNING_RATE} after {WARM_UP} steps of warm-up, gradient clipped at {MAX_NORM}",
            "domains": ", ".join(dict.fromkeys(corpus.domain)),
            "corruption": f"{corpus.corrupted.mean():.0%} of the windows, {options.corruption}",
            "validation": "; ".join(f"{name}: {len(held)} windows" for name, held in corpus.validation.items())
            + f", from {HELD_OUT:.0%} of the documents, held out; read before every step of {BATCH} windows",
            "valuation": "order 1, AdamW's own preconditioner",
            "seed": options.seed,
        },
    )
    console.print(findings(summary))
    console.print(f"{options.out / 'report.html'} written; {time.perf_counter() - started:.0f} s in all")
    console.print(f"more: ghostgram values {options.out / 'values'} --sources {options.out / 'sources.csv'}")


if __name__ == "__main__":
    main()
