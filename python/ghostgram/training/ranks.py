"""How the training of one model is spread over processes, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ghostgram.taps.sharding import is_sharded, local
from ghostgram.taps.uses import sums

T = TypeVar("T")

BUCKET = 1 << 24
"""Elements of gradients that are averaged by one message."""


class Ranks:
    """The processes that train a model: one alone; or several, by DistributedDataParallel or `fully_shard` (FSDP2).

    Both average gradients over the processes: a sample's share of the gradient that the optimizer reads is 1 / size of
    what its process's backward computes. Under DistributedDataParallel every process holds every gradient whole; under
    `fully_shard` a part of each. Sums over *samples* go over the processes in both cases, sums over *elements* of
    gradients in the second alone.

    Args:
        model: The model as it is trained, wrapper included.
        parameters: Those that the optimizer trains.

    Raises:
        ValueError: The model is spread over processes in another way, which is named.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        _check_wrapper(model)
        self.model, self.size, self.rank = model, 1, 0
        """The model without its wrapper; how many processes there are; which of them this is, from 0."""
        self.sharded = any(is_sharded(p) for p in parameters)
        self._wrapper: DistributedDataParallel | None = None
        self._group: dist.ProcessGroup | None = None
        self._sharding: list[Any] = []
        if isinstance(model, DistributedDataParallel):
            self.model, self._wrapper, self._group = model.module, model, model.process_group
        elif self.sharded:
            self._sharding = _check_sharding(model, parameters)
            self._group = parameters[0].device_mesh.get_group()  # type: ignore[attr-defined]
            self._reshard()
        if self._group is not None:
            self.size, self.rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        self._device = parameters[0].device if parameters else torch.device("cpu")

    # What they tell each other -------------------------------------------------------------------------------------

    def over_samples(self, sums: Tensor) -> Tensor:
        """The sum over all processes of sums over a process's samples."""
        return self._reduced(sums, dist.ReduceOp.SUM)

    def over_elements(self, sums: Tensor) -> Tensor:
        """The sum over all elements of sums over the elements that a process holds."""
        return self._reduced(sums, dist.ReduceOp.SUM) if self.sharded else sums

    def largest_element(self, largest: Tensor) -> Tensor:
        """The largest over all elements, from the largest that a process holds."""
        return self._reduced(largest, dist.ReduceOp.MAX) if self.sharded else largest

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes."""
        return self._reduced(values, dist.ReduceOp.SUM) / self.size

    def largest(self, number: float) -> float:
        """The largest number that any process gives."""
        return float(self._reduced(torch.tensor(number, dtype=torch.float64), dist.ReduceOp.MAX))

    def of_all(self, mine: Any) -> list[Any]:
        """What every process gives, in their order, on all of them; anything that can be pickled."""
        if self.size == 1:
            return [mine]
        given: list[Any] = [None] * self.size
        dist.all_gather_object(given, mine, group=self._group)
        return given

    def wait(self) -> None:
        """Returns once all processes have come here."""
        self.largest(0.0)

    def averaged(self, gradient: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The mean over processes of a gradient; as it is where backward averages it already. Uses up the gradient.

        16-bit gradients are added up in float32.
        """
        if self._wrapper is None or self.size == 1:
            return gradient
        mean: dict[nn.Parameter, Tensor] = {}
        for bucket in _buckets(gradient):
            taken = [gradient.pop(p) for p in bucket]
            flat = torch.cat([sums(g.detach()).flatten() for g in taken])
            dist.all_reduce(flat, group=self._group)
            flat /= self.size
            parts = torch.split(flat, [g.numel() for g in taken])
            mean |= {p: part.view(p.shape) for p, part in zip(bucket, parts, strict=True)}
        return mean

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        if self.size == 1:
            return values
        there = values.to(self._device, copy=True)
        dist.all_reduce(there, how, group=self._group)
        return there.to(values.device)

    # Passes beside the training's own ------------------------------------------------------------------------------

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Passes inside are none of the training's: they neither average gradients into `.grad` nor leave a trace.

        DistributedDataParallel neither synchronises buffers nor waits for a backward. `fully_shard` leaves the weights
        of a forward without backward gathered, and would go on with them after the weights have moved.
        """
        if self._wrapper is None:
            self._reshard()
            try:
                yield
            finally:
                self._reshard()
            return
        synchronises = self._wrapper.require_forward_param_sync
        with self._wrapper.no_sync():
            self._wrapper.require_forward_param_sync = False
            try:
                yield
            finally:
                self._wrapper.require_forward_param_sync = synchronises

    def _reshard(self) -> None:
        for module in self._sharding:
            module.reshard()


def rank_and_size(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Which process of a group this is, from 0, and how many there are: (0, 1) where torch.distributed is not used."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def led(work: Callable[[], T]) -> T:
    """What all processes need and one has to do: the first one does it, then the others, who find it done.

    Files are the way in which it is found, so that nothing has to be sent; where there is one process, it does it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return work()
    if dist.get_rank() == 0:
        made = work()
    dist.barrier()
    return made if dist.get_rank() == 0 else work()


def _check_wrapper(model: nn.Module) -> None:
    """Raises for wrappers under which a module's forward, its gradients or its weights are not what they seem."""
    if isinstance(model, DataParallel):
        raise ValueError("model: DataParallel runs copies of the model in threads: use DistributedDataParallel")
    if isinstance(model, DistributedDataParallel) and model.mixed_precision is not None:
        raise ValueError(
            "model: DistributedDataParallel(mixed_precision=...) keeps the weights that the layers use apart from those"
            " that the optimizer trains: use autocast"
        )
    if type(model).__module__.startswith("torch.distributed.pipelining"):
        raise ValueError(f"model: expected a whole model, got a {type(model).__name__} of pipeline parallelism")
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "model: FullyShardedDataParallel flattens parameters of different layers into one: use "
                "torch.distributed.fsdp.fully_shard"
            )
        if isinstance(module, DistributedDataParallel) and module is not model:
            raise ValueError(
                f"model: expected the DistributedDataParallel module itself, got a {type(model).__name__} around it"
            )


def _check_sharding(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Any]:
    """The modules to which `fully_shard` was applied, if it alone shards all the parameters, over one mesh."""
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    names = {p: name for name, p in model.named_parameters()}
    for p in parameters:
        name = names.get(p, f"a parameter of shape {tuple(p.shape)}")
        if not modules:
            raise ValueError(f"model: {name} is a DTensor without fully_shard: tensor parallelism is not supported")
        if not is_sharded(p):
            raise ValueError(f"model: {name} is not sharded, unlike others: apply fully_shard to the whole model")
        mesh = p.device_mesh  # type: ignore[attr-defined]
        if mesh.ndim != 1:
            raise ValueError(
                f"model: {name} is spread over a mesh of {mesh.ndim} dimensions, {mesh}: hybrid sharding (HSDP) and "
                "tensor or pipeline parallelism beside fully_shard are not supported, only a mesh of one"
            )
        if mesh != parameters[0].device_mesh:  # type: ignore[attr-defined]
            raise ValueError(f"model: {name} is spread over another mesh than the first parameter, {mesh}")
        if local(p).device.type != mesh.device_type:
            raise ValueError(f"model: {name} is kept on the CPU (CPUOffloadPolicy) and used elsewhere: not supported")
    return modules


def _buckets(gradient: dict[nn.Parameter, Tensor]) -> list[list[nn.Parameter]]:
    """The parameters of a gradient by dtype and device, in an order that is the same on every process."""
    buckets: list[list[nn.Parameter]] = []
    elements, kind = 0, None
    for p, g in gradient.items():
        if (key := (g.dtype, g.device)) != kind or elements + g.numel() > BUCKET:
            buckets.append([])
            elements, kind = 0, key
        buckets[-1].append(p)
        elements += g.numel()
    return buckets
