"""What processes tell each other about their mixture: sums of what they trained on, and that they agree."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

from ghostgram.algorithms.velocitune.simplex import F64


def summed(values: F64) -> F64:
    """The sum over all processes, the same on each; collective where there are several.

    Cost:
        One all-reduce of float64.
    """
    dist = _processes()
    if dist is None:
        return values
    import torch

    there = torch.from_numpy(values.copy()).to(_device(dist))
    dist.all_reduce(there)
    total: F64 = there.cpu().numpy()
    return total


def require_same(what: str, content: bytes) -> None:
    """Stops the run where processes hold different contents; collective where there are several.

    Raises:
        RuntimeError: On every process, with the ranks that differ from the first one.

    Cost:
        One all-gather of 16 bytes.
    """
    dist = _processes()
    if dist is None:
        return
    import torch

    digest = hashlib.blake2b(content, digest_size=16).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(_device(dist))
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    if others := [rank for rank, each in enumerate(every) if not torch.equal(each, every[0])]:
        raise RuntimeError(f"{what}: expected the same on every rank, got another one than rank 0's on ranks {others}")


def _processes() -> Any:
    """torch.distributed where there are several processes, else None; torch is not loaded to find out."""
    if "torch" not in sys.modules:
        return None
    import torch.distributed as dist

    there = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist if there else None


def _device(dist: Any) -> Any:
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
