"""Processes for the tests of distributed training: the same function on every rank, which gives its results back."""

import os
import pickle
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(count, function, folder, timeout=200):
    """[function(rank, folder) for every rank], each in a process of its own; a deadlock fails in `timeout` seconds."""
    context = mp.get_context("spawn")
    place = Path(folder)
    processes = [context.Process(target=_rank, args=(rank, count, function, place)) for rank in range(count)]
    for process in processes:
        process.start()
    until = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in late:
        processes[rank].kill()
        processes[rank].join()
    failed = [path.read_text() for path in sorted(place.glob("failed-*"))]
    assert not failed, "\n".join(failed)
    assert not late, f"ranks {late} had not ended after {timeout} s"
    return [pickle.loads((place / f"result-{rank}").read_bytes()) for rank in range(count)]


def _rank(rank, count, function, place):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=count)
    try:
        (place / f"result-{rank}").write_bytes(pickle.dumps(function(rank, place)))
    except BaseException:
        (place / f"failed-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the others may be waiting for this one
    dist.destroy_process_group()
