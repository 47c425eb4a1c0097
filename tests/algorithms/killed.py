"""A run that may be killed at any moment and started again: it goes on from its last checkpoint.

As a script: killed.py FOLDER RANK RANKS MEETING; it says "going" once it trains.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import ghostgram as gg
from algorithms.models import Small, mse, regression

STEPS, ROWS = 40, 4
OPTIONS = {1: {"refresh": 3}, 2: {"order": 2, "late": "replay"}}  # by the number of ranks


class WithDropout(Small):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.3, self.training))


def train(folder, rank=0, ranks=1, going=lambda: None):
    """All steps that are left; a checkpoint before them and after every fourth, a part of the log after every third."""
    torch.manual_seed(rank)
    net = WithDropout()
    model = DistributedDataParallel(net) if ranks > 1 else net
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    first, checkpoint, mine = 0, folder / "checkpoint", folder / f"random-{rank}"
    begun = checkpoint.exists()  # looked for before any rank can write one
    shapley = gg.InRunShapley(
        model, optimizer, lambda m: mse(m, regression(7, 99)), log=folder / "log", resume=True, flush_every=3,
        **OPTIONS[ranks],
    )  # fmt: skip

    def checkpointed(step):
        save(mine.with_suffix(f".{step}"), torch.get_rng_state())
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        state["shapley"] = shapley.state_dict()
        if rank == 0:
            save(checkpoint, state)

    if begun:
        state = torch.load(checkpoint)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        shapley.load_state_dict(state["shapley"])
        first = state["step"]
        torch.set_rng_state(torch.load(mine.with_suffix(f".{first}")))
    else:
        checkpointed(0)
    going()
    for step in range(first, STEPS):
        batch, ids = regression(ROWS, ranks * step + rank), torch.arange(ROWS) + ROWS * (ranks * step + rank)
        with shapley.step():
            for half in (slice(0, 2), slice(2, 4)):
                rows = [each[half] for each in batch]

                def losses(rows=rows):
                    return mse(model, rows) / 2

                with shapley.samples(ids[half], losses):
                    losses().backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 4 == 0:
            checkpointed(step + 1)
    shapley.close()


def save(path, state):
    """To a temporary file, then by its name: a kill leaves the file before or the file after."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


if __name__ == "__main__":
    folder, rank, ranks, meeting = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    train(folder, rank, ranks, lambda: print("going", flush=True))
    if ranks > 1:
        dist.destroy_process_group()
        os._exit(0)  # of 40 runs, 2 had a rank that gloo's threads aborted while Python was leaving
