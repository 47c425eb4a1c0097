"""Random states in checkpoints: a run that goes on from one draws what it would have drawn, dropout included."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)


def random_states() -> list[dict[str, Any]]:
    """What torch's generators of every process hold, in their order; all processes must call it."""
    mine = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    if not _several():
        return [mine]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def put_back(states: list[dict[str, Any]]) -> None:
    """Gives this process's generators what they held; says so if there are more or fewer processes now."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)
    if len(states) != size:
        logger.warning("the checkpoint is of %d processes, this run of %d: its dropout is another", len(states), size)
        return
    torch.set_rng_state(states[rank]["cpu"])
    torch.cuda.set_rng_state_all(states[rank]["cuda"])


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
