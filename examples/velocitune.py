"""Velocitune on real text: a small model that knows documentation learns code, headers and documentation at once.

Shorter runs predict what loss each kind of text will reach; then the same model is trained on the three by the
proportions of the data, and by weights that follow what remains of each kind's way to its predicted loss.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tiny_lm import TinyLM
from torch import Tensor, nn
from torch.nn import functional as F

import ghostgram as gg
from ghostgram import data
from ghostgram.algorithms.velocitune import DomainSampler, evaluate_domains
from ghostgram.algorithms.velocitune.estimate import estimate_targets
from ghostgram.algorithms.velocitune.losses import NextTokenLoss
from ghostgram.algorithms.velocitune.proxy import proxy_points, proxy_sizes
from ghostgram.algorithms.velocitune.rules.static import Static
from ghostgram.algorithms.velocitune.rules.velocitune import Velocitune
from ghostgram.algorithms.velocitune.targets import Targets

DOMAINS = ("python_code", "cpp_headers", "tech_docs")
KNOWN = "tech_docs"
LENGTH, BATCH, RATE = 128, 16, 1e-3
HELD_OUT = 48  # rows of each domain, from documents that no arm trains on

Rows = dict[str, Tensor]


def load(rows: int) -> tuple[Rows, Rows]:
    """At most so many rows of each domain to train on, in bytes, and rows of other documents to evaluate on."""
    training, held_out = {}, {}
    for name in DOMAINS:
        documents = [document.encode() for document in data.load_text(name)]
        rng = np.random.default_rng(0)
        rng.shuffle(documents)
        cut = len(documents) // 5
        held_out[name], training[name] = cut_up(documents[:cut], HELD_OUT), cut_up(documents[cut:], rows)
    return training, held_out


def cut_up(documents: list[bytes], most: int) -> Tensor:
    """(n, LENGTH) the bytes of documents, one after another."""
    text = np.frombuffer(b"\n\n".join(documents)[: most * LENGTH], np.uint8)
    whole = len(text) // LENGTH
    return torch.from_numpy(text[: whole * LENGTH].astype(np.int64)).view(whole, LENGTH)


def learn(model: nn.Module, batches: Iterator[Any], steps: int) -> None:
    """Trains on what comes, the learning rate falling to 0 over the last fifth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 5 * (1 - step / steps)))
    for batch in batches:
        rows = batch.data
        F.cross_entropy(model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def sampler(
    model: TinyLM, training: Rows, held_out: Rows, rule: Any, tokens: int, log: Path | None = None
) -> DomainSampler:
    """Batches of all domains, weighted by a rule: one that is logged is moved 25 times, others once, at the end."""
    return gg.velocitune(
        training, model, held_out, rule=rule, tokens=tokens, global_batch=BATCH, interval=0.04 if log else 1.0, log=log,
        loss=NextTokenLoss(model, model.head), parameters=sum(p.numel() for p in model.blocks.parameters()),
    )  # fmt: skip


def measured(model: TinyLM, held_out: Rows) -> dict[str, tuple[float, float]]:
    """Loss and standard error by domain."""
    found = evaluate_domains(model, held_out, loss=NextTokenLoss(model, model.head))
    return {name: (float(found.loss[k]), float(found.se[k])) for k, name in enumerate(held_out)}


def predicted(base: TinyLM, training: Rows, held_out: Rows, tokens: int, out: Path) -> Targets:
    """Stage 1: the same model on five shorter budgets of the data as it is, and the laws of its losses."""

    def train(budget: int) -> dict[str, tuple[float, float]]:
        model = copy.deepcopy(base)
        learn(model, iter(sampler(model, training, held_out, Static(), budget)), budget // (BATCH * LENGTH))
        return measured(model, held_out)

    whole = BATCH * LENGTH
    sizes = [max(1, round(size / whole)) * whole for size in proxy_sizes(tokens, smallest=1 / 24)]
    points = proxy_points(train, sizes, record=out / "proxy.json")
    start = measured(base, held_out)
    # Small runs leave wide intervals: they are drawn, and the robust preset weighs them, so they are no reason to stop.
    made = estimate_targets(points, start, tokens, "anchored", allow=("interval", "bound"))
    made.save(out / "targets.json")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Trains the model that knows one domain, predicts, trains the arms, and says what each has reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("velocitune-output"), help="a folder that is not there yet")
    parser.add_argument("--steps", type=int, default=600, help="of each arm")
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True)
    torch.manual_seed(0)
    tokens = args.steps * BATCH * LENGTH
    training, held_out = load(rows=args.steps * BATCH // 2)
    base = TinyLM(width=args.width, layers=2, heads=4, context=LENGTH)
    known = {KNOWN: training[KNOWN]}
    learn(base, iter(sampler(base, known, {KNOWN: held_out[KNOWN]}, Static(), tokens // 2)), args.steps // 2)
    targets = predicted(base, training, held_out, tokens, args.out)
    arms = {
        "proportional": Static(),
        "paper": Velocitune(targets, "paper"),
        "robust": Velocitune(targets, "robust", budget=tokens),
    }
    table = Table(
        "arm", "domain", "before", "target", "after", "V", "mean weight", "epochs", title="What each has reached"
    )
    found: dict[str, Any] = {}
    for arm, rule in arms.items():
        model = copy.deepcopy(base)
        batches = sampler(model, training, held_out, rule, tokens, args.out / arm)
        learn(model, iter(batches), args.steps)
        batches.export().save(args.out / f"{arm}.json")
        after, epochs = measured(model, held_out), batches.controller.counts.draws / batches.controller.sizes
        found[arm] = {"loss": {name: loss for name, (loss, _) in after.items()}, "mean": batches.export().mean.tolist()}
        for k, (name, one) in enumerate(targets.by_domain.items()):
            v = (after[name][0] - one.target) / (one.l_init - one.target)
            numbers = (one.l_init, one.target, after[name][0], v, found[arm]["mean"][k], epochs[k])
            table.add_row(arm if not k else "", name, *(f"{number:.3f}" for number in numbers))
    (args.out / "found.json").write_text(json.dumps(found, indent=1) + "\n")
    Console().print(table)
    print(f"`ghostgram velocitune report {args.out / 'robust'} --out figures` draws how the weights moved.")


if __name__ == "__main__":
    main()
