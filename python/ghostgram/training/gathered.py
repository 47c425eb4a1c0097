"""Many small results on the CPU at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def gathered(parts: Iterable[Tensor]) -> Tensor:
    """Equally shaped tensors stacked on the CPU in float64: one transfer for each device, not one for each of them."""
    parts = list(parts)
    devices = {part.device for part in parts}
    if len(devices) <= 1:
        return torch.stack(parts).double().cpu() if parts else torch.empty(0, dtype=torch.float64)
    stacked = torch.empty(len(parts), *parts[0].shape, dtype=torch.float64)
    for device in devices:
        there = [i for i, part in enumerate(parts) if part.device == device]
        stacked[there] = torch.stack([parts[i] for i in there]).double().cpu()
    return stacked
