"""Tensors of which every process holds a part: DTensors, as `torch.distributed.fsdp.fully_shard` makes of parameters.

DTensors are known by their methods: importing `torch.distributed.tensor` takes half a second, and only who shards a
model needs it.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

Maybe = TypeVar("Maybe", Tensor, "Tensor | None")


def is_sharded(tensor: Tensor) -> bool:
    """Whether processes hold parts of a tensor."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which may be empty, sharing its memory; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def whole(tensor: Maybe) -> Maybe:
    """The whole of a tensor, on every process; a plain tensor as it is. All processes must call it in one order."""
    if tensor is None or not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()  # type: ignore[attr-defined, no-any-return]


def rows_of(parameter: Tensor) -> tuple[int, int]:
    """Where the entries along a parameter's first axis that this process holds start and stop; may be none.

    Raises:
        ValueError: It is cut along another axis.
    """
    if not is_sharded(parameter):
        return 0, len(parameter)
    sharded: Any = parameter
    (placement,) = sharded.placements
    if not placement.is_shard(0):
        raise ValueError(f"parameter: expected it to be sharded along its first axis, got {placement}")
    of_each = -(-len(parameter) // sharded.device_mesh.size())
    start = min(of_each * sharded.device_mesh.get_local_rank(), len(parameter))
    return start, start + len(local(parameter))


def parts_of(parts: Tensor, parameter: Tensor) -> Tensor:
    """Every process's (K, *local shape) as one tensor (K, *shape), sharded as a parameter is; without communication."""
    if not is_sharded(parameter):
        return parts
    from torch.distributed.tensor import DTensor, Shard

    sharded: Any = parameter
    placements = [Shard(each.dim + 1) if each.is_shard() else each for each in sharded.placements]
    shape = torch.Size((parts.shape[0], *parameter.shape))
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        parts, sharded.device_mesh, placements, run_check=False, shape=shape, stride=strides
    )  # fmt: skip
