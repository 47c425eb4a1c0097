"""MATES on real text: a small model chooses what it learns next, to get better at novels that it is never given.

The pool is windows of documents of many kinds, the reference windows of novels; each arm trains from the same warmed-up
model on as many documents: those that MATES chooses stage by stage, random ones, ones of middling perplexity, ones that
an n-gram classifier takes for novels. All but MATES run once more, with as many operations as it spent.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tiny_lm import TinyLM
from torch import nn
from torch.utils.data import DataLoader

from ghostgram import data
from ghostgram.algorithms.mates import PlanDataset, Pool, Reference, StageLoop, Task
from ghostgram.algorithms.mates.dataset import write_texts
from ghostgram.algorithms.mates.evaluate import paired_difference
from ghostgram.algorithms.mates.files.store import Stage
from ghostgram.algorithms.mates.flops import FlopsLedger, Transformer
from ghostgram.algorithms.mates.influence.curve import learning_curve
from ghostgram.algorithms.mates.influence.model import fit
from ghostgram.algorithms.mates.labels.task import padded
from ghostgram.algorithms.mates.selection.select import select
from ghostgram.report import mates as plots

DOMAINS = ("python_code", "tech_docs", "cpp_headers", "shakespeare", "kjv", "licences", "emails", "manuals", "foldoc")
NOVELS = "austen"
WINDOW, BATCH = 128, 32
WIDTH, LAYERS, HEADS = 64, 2, 4
RATE, DECAY, CLIP, WARM_UP = 1e-3, 0.1, 1.0, 20
REFERENCE, TEST = 256, 512  # windows of novels: what labels are measured by, and what arms are judged by
HELD_OUT = 0.2  # of every kind's documents, for the test of what is not novels
EQUAL = ", equal FLOPs"
ARMS = (
    "mates",
    "random",
    "perplexity",
    "classifier",
    *(f"{way}{EQUAL}" for way in ("random", "perplexity", "classifier")),
)
PERPLEXITY_BAND = (0.3, 0.7)  # quantiles of a document's own loss


def encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of windows; all but the first are to be predicted."""
    rows = [torch.frombuffer(bytearray(text.encode("utf-8")[: WINDOW + 1]), dtype=torch.uint8).long() for text in texts]
    return padded(rows)


TASK = Task(encode)


@dataclass
class Corpus:
    """What all seeds share."""

    pool: Pool
    reference: Reference
    tests: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Windows of held-out documents: of novels, and of the pool's kinds."""
    novels: list[str]
    """The reference's texts, for the classifier."""


def gather(folder: Path, each: int, console: Console) -> Corpus:
    """Writes the pool, `each` windows of every kind to be had, and cuts reference and tests of other documents."""
    training, other = {}, {}
    for name in (*DOMAINS, NOVELS):
        try:
            training[name], other[name] = data.split(data.load_text(name), HELD_OUT, seed=0)
        except data.DomainUnavailable as why:
            console.print(f"[yellow]going on without {name}:[/] {why}")
    if NOVELS not in training or len(training) < 4:
        raise SystemExit("the example needs the novels and three other kinds of text")
    kinds = [name for name in training if name != NOVELS]
    folder.mkdir(parents=True, exist_ok=True)
    for name in kinds:
        texts = readable(data.windows(training[name], WINDOW, each, seed=0))
        columns = {"text": texts, "kind": [name] * len(texts), "tokens": [len(text.encode()) for text in texts]}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    novels = readable(data.windows(training[NOVELS], WINDOW, REFERENCE, seed=0))
    judged = {"novels": readable(data.windows(other[NOVELS], WINDOW, TEST, seed=0, absent_from=training[NOVELS]))}
    share = max(1, TEST // len(kinds))
    judged["pool"] = [w for k in kinds for w in readable(data.windows(other[k], WINDOW, share, 0))]
    return Corpus(
        Pool(f"{folder}/*.parquet", domain="kind", n_tokens="tokens"),
        Reference.from_texts("novels", novels, TASK, evaluation=judged),
        {name: encode(texts) for name, texts in judged.items()},
        novels,
    )


def readable(windows: np.ndarray) -> list[str]:
    """Windows of bytes as text; a character that the cut has halved is left out."""
    return [window.tobytes().decode("utf-8", "ignore") for window in windows]


@dataclass
class Trainee:
    """A model, its optimizer and schedule, and how it does."""

    model: TinyLM
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    step: int = 0

    @classmethod
    def new(cls, seed: int) -> Trainee:
        torch.manual_seed(seed)
        model = TinyLM(WIDTH, LAYERS, HEADS, WINDOW)
        optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=DECAY)
        return cls(
            model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / WARM_UP))
        )

    def twin(self) -> Trainee:
        return copy.deepcopy(self)

    def train(self, texts: list[str]) -> None:
        TASK.losses(self.model, *encode(texts)).mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1

    @torch.no_grad()
    def loss(self, ids: torch.Tensor, mask: torch.Tensor) -> float:
        sums = [TASK.sums(self.model, i, m) for i, m in zip(ids.split(128), mask.split(128), strict=True)]
        return float(sum(s.sum() for s, _ in sums) / sum(c.sum() for _, c in sums))


def batches(dataset: PlanDataset) -> Iterator[list[str]]:
    return iter(DataLoader(dataset, BATCH, collate_fn=list))


@dataclass
class Setting:
    """What an arm is given."""

    corpus: Corpus
    seed: int
    stage_steps: int
    stages: int
    labels: int
    audit: int
    folder: Path
    advance: Callable[[], None]

    @property
    def steps(self) -> int:
        """Of an arm."""
        return self.stages * self.stage_steps


def sizes(model: nn.Module) -> Transformer:
    """What operations are counted by; the head is the embedding, and is multiplied with."""
    parameters = sum(p.numel() for p in model.parameters())
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith("position")
    )
    return Transformer(matrices, LAYERS, WIDTH, parameters)


def chosen_by_mates(setting: Setting, trainee: Trainee) -> Iterator[tuple[list[str], StageLoop]]:
    """Batches of the plans that the model being trained asks for, and the loop."""
    corpus, dataset = setting.corpus, PlanDataset(str)
    loop = StageLoop(
        dataset, corpus.pool, corpus.reference, TASK, setting.folder, every=setting.stage_steps, warm_up=1,
        documents_per_step=BATCH, docs=setting.stage_steps * BATCH, labels=setting.labels, audit=setting.audit,
        clip=CLIP, seed=setting.seed, workers=1, progress=False,
    )  # fmt: skip
    loop.next_stage(0, trainee.model, trainee.optimizer)
    for step, texts in enumerate(batches(dataset), 1):
        yield texts, loop
        if step < setting.steps:
            loop.step_done(step, trainee.model, trainee.optimizer)


def chosen_once(setting: Setting, scores: dict[str, np.ndarray], steps: int) -> Iterator[list[str]]:
    """Batches of documents drawn once by scores of each shard, at the temperature that MATES draws at.

    Where there are more steps than the pool has documents for, it is drawn from again.
    """
    pool, tables = setting.corpus.pool, []
    for shard in pool.shards:
        table = pa.concat_tables([t.select(["doc_id", "n_tokens", "domain"]) for t in pool.documents(shard)])
        tables.append(table.append_column("z_novels", pa.array(scores[shard.path], pa.float32())))
    random = all((each == 0).all() for each in scores.values())
    left, turn = steps, 0
    while left:
        plan = select(
            tables, docs=left * BATCH, seed=setting.seed, stage=turn, standardise="none" if random else "pool"
        )
        texts = setting.folder / f"texts-{turn}.arrow"
        write_texts(plan, pool, texts)
        dataset = PlanDataset(str)
        dataset.switch(0, texts)
        held = min(left, len(plan) // BATCH)
        yield from itertools.islice(batches(dataset), held)
        left, turn = left - held, turn + 1


def scores_of(pool: Pool, score: Callable[[list[str]], np.ndarray]) -> dict[str, np.ndarray]:
    """Of every document, by shard."""
    return {
        shard.path: np.concatenate([score(table["text"].to_pylist()) for table in pool.documents(shard)])
        for shard in pool.shards
    }


def own_losses(model: nn.Module, texts: list[str]) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate(
            [TASK.losses(model, *encode(texts[i : i + 128])).numpy() for i in range(0, len(texts), 128)]
        )


def by_perplexity(setting: Setting, warm: Trainee) -> dict[str, np.ndarray]:
    """Highest in the middle of the pool's own losses, falling to both sides."""
    losses = scores_of(setting.corpus.pool, lambda texts: own_losses(warm.model, texts))
    low, high = np.quantile(np.concatenate(list(losses.values())), PERPLEXITY_BAND)
    return {path: -np.abs(each - (low + high) / 2) for path, each in losses.items()}


def by_classifier(setting: Setting) -> dict[str, np.ndarray]:
    """Least squares on hashed n-grams, novels against the pool: what it takes for a novel scores high."""
    corpus = setting.corpus
    rest = corpus.pool.sample(len(corpus.novels), seed=setting.seed)["text"].to_pylist()
    texts, labels = [*corpus.novels, *rest], np.repeat([1.0, 0.0], [len(corpus.novels), len(rest)])
    ids = [f"{i}".encode() for i in range(len(texts))]
    model = fit(texts, labels[:, None], ids, ["novels"], seed=setting.seed)
    return scores_of(corpus.pool, lambda texts: model.score(texts)[:, 0])


def run_arm(name: str, setting: Setting, warm: Trainee, steps: int) -> dict[str, Any]:
    """Trains one arm from the warm model: its losses over time, its operations, and what it chose."""
    trainee, spent, counted = warm.twin(), FlopsLedger(), sizes(warm.model)
    shutil.rmtree(setting.folder, ignore_errors=True)
    setting.folder.mkdir(parents=True)
    found: dict[str, Any] = {"step": [], "stages": [], **{test: [] for test in setting.corpus.tests}}
    pool_tokens = sum(int(t["n_tokens"].to_numpy().sum()) for s in setting.corpus.pool.shards
                      for t in setting.corpus.pool.documents(s))  # fmt: skip
    seen = -1
    if name == "mates":
        source: Iterator[Any] = chosen_by_mates(setting, trainee)
    else:
        scores = {
            "perplexity": lambda: by_perplexity(setting, warm),
            "classifier": lambda: by_classifier(setting),
        }.get(name, lambda: scores_of(setting.corpus.pool, lambda texts: np.zeros(len(texts))))()
        source = ((texts, None) for texts in chosen_once(setting, scores, steps))
        if name == "perplexity":
            spent.add("score", counted.forward(pool_tokens, WINDOW))
    for texts, loop in source:
        if loop is not None and loop.stage != seen:
            seen = loop.stage
            found["stages"].append(told_of(loop, setting, spent))
        trainee.train(texts)
        spent.add("train", counted.train(sum(len(t.encode()) for t in texts), WINDOW))
        setting.advance()
        done = trainee.step - warm.step
        if done % max(1, steps // 6) == 0 or done == steps:
            found["step"].append(done)
            for test, windows in setting.corpus.tests.items():
                found[test].append(trainee.loss(*windows))
        if done == steps:
            break
    return found | {"flops": spent.spent}


def told_of(loop: StageLoop, setting: Setting, spent: FlopsLedger) -> dict[str, Any]:
    """What a stage has found, for the report, and its operations into the account."""
    made, manifest = loop.selection, loop.selection.labels.manifest
    exact = manifest["flops"].get("exact", 0.0)
    spent.add("audit", exact)
    spent.add("label", sum(manifest["flops"].values()) - exact)
    words = sum(len(text.split()) for text in loop.pool.sample(setting.labels)["text"].to_pylist())
    if "fit" in made.folders:
        notes = made.scorer.report.notes
        spent.add("fit", 8 * words * sum(notes["iterations"]))  # two products with the sparse matrix, of 1- and 2-grams
    spent.add("score", 4 * words / setting.labels * made.labels.table.num_rows)
    domains = made.plan.table["domain"].value_counts().to_pylist()
    head = made.scorer.report.heads[0]
    return {
        "stage": made.number, "backend": manifest["chosen"], "audit": manifest["audit"], "drift": made.drift,
        "held_out": {"spearman": head.spearman, "low": head.low, "high": head.high},
        "domains": {each["values"]: each["counts"] for each in domains}, "report": made.plan.report,
    }  # fmt: skip


def run_seed(seed: int, corpus: Corpus, args: argparse.Namespace, folder: Path, advance: Callable[[], None]) -> Any:
    """Warms a model up and trains every arm from it."""
    warm = Trainee.new(seed)
    setting = Setting(corpus, seed, args.stage_steps, args.stages, args.labels, args.audit, folder / "warm", advance)
    setting.folder.mkdir(parents=True, exist_ok=True)
    zeros = scores_of(corpus.pool, lambda texts: np.zeros(len(texts)))
    for step, texts in enumerate(chosen_once(setting, zeros, args.warm_up), 1):
        warm.train(texts)
        advance()
        if step == args.warm_up:
            break
    arms: dict[str, Any] = {}
    per_step = sizes(warm.model).train(BATCH * WINDOW, WINDOW)
    for name in ARMS:
        way, more = name.removesuffix(EQUAL), 0
        if name != way:
            mates, cheaper = (sum(arms[each]["flops"].values()) for each in ("mates", way))
            more = round((mates - cheaper) / per_step)
        setting.folder = folder / way
        arms[name] = run_arm(way, setting, warm, setting.steps + more) | {"steps": setting.steps + more}
    return arms


def show(found: dict[int, Any], console: Console) -> None:
    """The final losses of every arm, and paired differences from random choice."""
    arms = list(next(iter(found.values())))
    table = Table(title=f"loss in nats per byte after training, {len(found)} seeds")
    for column in ("arm", "steps", "novels", "against random (95 %)", "pool's kinds", "FLOPs", "of it choosing"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in arms:
        last = {test: {seed: each[arm][test][-1] for seed, each in found.items()} for test in ("novels", "pool")}
        against = "" if arm == "random" or len(found) < 2 else "{:+.4f} [{:+.4f}, {:+.4f}]".format(
            *paired_difference(last["novels"], {s: e["random"]["novels"][-1] for s, e in found.items()})[:3]
        )  # fmt: skip
        flops = [sum(each[arm]["flops"].values()) for each in found.values()]
        chosen = [1 - each[arm]["flops"]["train"] / sum(each[arm]["flops"].values()) for each in found.values()]
        table.add_row(
            arm, f"{np.mean([e[arm]['steps'] for e in found.values()]):.0f}",
            f"{np.mean(list(last['novels'].values())):.4f}", against,
            f"{np.mean(list(last['pool'].values())):.4f}", f"{np.mean(flops):.2e}", f"{np.mean(chosen):.0%}",
        )  # fmt: skip
    console.print(table)
    stages = Table(title="what MATES found, by seed and stage")
    for column in ("seed", "stage", "backend", "audit rho", "held-out Spearman", "drift", "most chosen"):
        stages.add_column(column)
    for seed, each in found.items():
        for stage in each["mates"]["stages"]:
            audit = stage["audit"] or {"comparisons": []}
            rho = next((c["rho"] for c in audit["comparisons"] if c["backend"] == stage["backend"]), None)
            most = sorted(stage["domains"].items(), key=lambda item: -item[1])[:3]
            stages.add_row(
                str(seed), str(stage["stage"]), stage["backend"], "-" if rho is None else f"{rho:.3f}",
                f"{stage['held_out']['spearman']:.3f}", ", ".join(f"{d:.3f}" for d in stage["drift"].values()) or "-",
                ", ".join(f"{name} {count}" for name, count in most),
            )  # fmt: skip
    console.print(stages)


def draw_curve(path: Path, pool: Pool, run: Path, console: Console) -> None:
    """What more labels would buy, by the first stage's."""
    (key,) = (folder.name for folder in (run / "stage-1" / "label").iterdir())
    labels = Stage(run, 1, "label", key).read()
    by_id = dict(zip(*(pool.sample(10**9)[name].to_pylist() for name in ("doc_id", "text")), strict=True))
    ids = labels["doc_id"].to_pylist()
    curve = learning_curve([by_id[i] for i in ids], labels["influence_novels"].to_numpy()[:, None], ids, ["novels"])
    columns = zip(*((p.labels, p.spearman, p.low, p.high) for p in curve.points), strict=True)
    plots.learning(path, *columns, curve.law.at)
    points = ", ".join(f"{point.labels}: {point.spearman:.3f}" for point in curve.points)
    console.print(
        f"learning curve: {points}; a doubling gains {curve.gain.value:.3f} ({curve.gain.low:.3f} to "
        f"{curve.gain.high:.3f}): {curve.verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mates-output"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--each", type=int, default=2000, help="windows of every kind in the pool")
    parser.add_argument("--warm-up", type=int, default=200, help="steps on random documents before the arms part")
    parser.add_argument("--stage-steps", type=int, default=150)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--labels", type=int, default=2000)
    parser.add_argument("--audit", type=int, default=128)
    args = parser.parse_args()
    console = Console()
    corpus = gather(args.out / "pool", args.each, console)
    kept = args.out / "results.json"
    asked = {name: value for name, value in vars(args).items() if name not in ("out", "seeds")}
    found: dict[int, Any] = {}
    if kept.exists() and (before := json.loads(kept.read_text()))["settings"] == asked:
        found = {int(seed): each for seed, each in before["seeds"].items()}  # seeds that are done are not done again
    with Progress(console=console) as bar:
        total = len(args.seeds) * (args.warm_up + len(ARMS) * args.stages * args.stage_steps)
        task = bar.add_task("training", total=total)
        for seed in args.seeds:
            if seed not in found:
                found[seed] = run_seed(seed, corpus, args, args.out / f"seed-{seed}", lambda: bar.advance(task))
                kept.with_suffix(".tmp").write_text(json.dumps({"settings": asked, "seeds": found}))
                kept.with_suffix(".tmp").replace(kept)
    show({seed: found[seed] for seed in args.seeds}, console)
    plots.arms(args.out / "arms.png", {seed: found[seed] for seed in args.seeds})
    plots.domains(args.out / "domains.png", found[args.seeds[0]]["mates"]["stages"])
    draw_curve(args.out / "learning.png", corpus.pool, args.out / f"seed-{args.seeds[0]}" / "mates", console)
    console.print(
        f"wrote {kept}, arms.png, domains.png and learning.png; more: ghostgram mates status {args.out}/seed-*/mates"
    )


if __name__ == "__main__":
    main()
