"""A training run of several stages, which goes on from its last checkpoint: `training.py FOLDER [RANK RANKS]`."""

import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from algorithms.mates.models import TASK, TinyLM, documents, reference
from ghostgram.algorithms.mates.dataset import PlanDataset
from ghostgram.algorithms.mates.files.pool import Pool
from ghostgram.algorithms.mates.loop import StageLoop

BATCH, EVERY, STEPS = 8, 5, 13


def write_pool(folder):
    """Three shards of documents, each of one of two domains; some documents are there twice."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(text) for text in documents(400, seed=5, shortest=4, longest=9)]  # letters are words
    texts += texts[:40]
    for number in range(3):
        mine = texts[number::3]
        table = {
            "text": mine,
            "n": [len(text) for text in mine],
            "source": ["web" if "a" in t else "book" for t in mine],
        }
        pq.write_table(pa.table(table), folder / f"{number}.parquet")
    return pool_of(folder)


def pool_of(folder):
    return Pool(f"{folder}/*.parquet", domain="source", n_tokens="n")


def train(folder, steps=STEPS, rank=0, ranks=1, **options):
    torch.manual_seed(0)
    model = TinyLM(width=16, layers=1, heads=2, context=24)
    trained = model if ranks == 1 else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = PlanDataset(str)
    settings = {"docs": 60, "labels": 120, "backend": "exact", "clip": 1.0, "workers": 1, "progress": False}
    stages = {"every": EVERY, "documents_per_step": BATCH, "check_every": 3, "check": 8, "refresh_below": -1.0}
    loop = StageLoop(data, pool_of(folder / "pool"), reference(), TASK, folder / "run", **stages | settings | options)
    checkpoint, done = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        held = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        loop.load_state_dict(held["loop"])
        done = held["step"]
    loop.begin()
    if done >= steps:
        return loop, model
    for step, texts in enumerate(DataLoader(data, BATCH, collate_fn=list), done + 1):
        TASK.losses(trained, *TASK.encode(texts[rank::ranks])).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loop.step_done(step, trained, optimizer)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save({**state, "loop": loop.state_dict(step)}, folder / f"checkpoint.tmp-{rank}")
        os.replace(folder / f"checkpoint.tmp-{rank}", checkpoint.with_suffix(f".{rank}" if rank else ".pt"))
        if step == steps:
            return loop, model


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank, ranks = Path(sys.argv[1]), *map(int, sys.argv[2:] or (0, 1))
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    train(folder, rank=rank, ranks=ranks)
    os._exit(0)  # gloo's threads may abort a process that leaves
