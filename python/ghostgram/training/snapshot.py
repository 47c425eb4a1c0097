"""A training job's weights, buffers, optimizer state and random states at one moment, to go back to again and again."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ghostgram.training.aside import RandomStates

PLAIN = (int, float, str, bytes, type(None))


class Snapshot:
    """All that an update moves, as it is now: parameters, buffers, the optimizer's state and settings, random states.

    `restore` puts everything back into the storages it came from, so that whatever points there (the optimizer, tied
    weights, compiled code, captured graphs) goes on working, and takes away what has been added to the state since.
    Tensors made of several others (sharded or quantised ones) are kept part by part. Copies lie on the tensors' device,
    or in pinned memory of the host where a GPU has no room for them. `state_dict()` would give the live tensors
    themselves.

    Args:
        model: Owns the parameters and buffers.
        optimizer: Has the state.

    Raises:
        TypeError: A state entry or setting is neither tensor nor number nor a plain container of numbers: it could not
            be put back.

    Cost:
        One copy of everything (12 bytes a parameter for Adam in float32), which `restore` reads and writes once.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._settings = [
            (group, {name: value for name, value in group.items() if name != "params"})
            for group in optimizer.param_groups
        ]
        self._states = {p: dict(state) for p, state in optimizer.state.items()}
        for entries in (*(held for _, held in self._settings), *self._states.values()):
            for name, value in entries.items():
                _check_restorable(name, value)
                if not isinstance(value, Tensor):
                    entries[name] = copy.deepcopy(value)
        self._tensors = state_tensors(model, optimizer)
        live = list(self._tensors.values())
        self._copies = _copies(live)
        self._random = RandomStates(model)
        self.digest = tensors_digest(self._tensors)
        """32 hexadecimal digits of all tensors; see `tensors_digest`."""

    def restore(self) -> None:
        """Makes everything what it was, to the bit."""
        for group, held in self._settings:
            parameters = group["params"]
            _refill(group, held)
            group["params"] = parameters
        state = self._optimizer.state
        for p in [p for p in state if p not in self._states]:
            del state[p]
        for p, held in self._states.items():
            _refill(state[p], held)
        with torch.no_grad():
            torch._foreach_copy_(list(self._tensors.values()), self._copies)
        self._random.put_back()

    def check(self) -> None:
        """Raises RuntimeError, naming tensors, unless all tensors have the bits they had."""
        if tensors_digest(self._tensors) == self.digest:
            return
        pairs = zip(self._tensors.items(), self._copies, strict=True)
        changed = [name for (name, now), was in pairs if not torch.equal(_bytes(now), _bytes(was))]
        where = ", ".join(changed[:8]) if changed else "the copies themselves"
        raise RuntimeError(f"the training state is not what it was when the snapshot was taken: changed are {where}")


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and bytes, in any order of the names: 32 hexadecimal digits (BLAKE2b-128)."""

    def content(tensor: Tensor) -> bytes:
        return hashlib.blake2b(_bytes(tensor).numpy().data, digest_size=16).digest()

    total = hashlib.blake2b(digest_size=16)
    names = sorted(tensors)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing leaves the interpreter to others
        for name, digest in zip(names, threads.map(content, [tensors[name] for name in names]), strict=True):
            total.update(repr((name, str(tensors[name].dtype), tuple(tensors[name].shape))).encode() + digest)
    return total.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's memory on the CPU, (bytes,) uint8: unlike numbers, bytes of nan equal themselves."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The plain tensors that parameters, buffers, settings and state are made of, by name, sharing their memory."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        names |= {p: f"{index}.{i}" for i, p in enumerate(group["params"]) if p not in names}
    found: dict[str, Any] = {f"model.{name}": p for p, name in names.items()}
    found |= {f"model.{name}": buffer for name, buffer in model.named_buffers()}
    for index, group in enumerate(optimizer.param_groups):
        found |= {f"optimizer.{index}.{name}": value for name, value in group.items()}
    for p, state in optimizer.state.items():
        found |= {f"optimizer.{names[p]}.{name}": value for name, value in state.items()}
    return dict(part for name, value in found.items() if isinstance(value, Tensor) for part in _parts(name, value))


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A plain tensor, or those that a sharded or quantised one is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor.detach()
        return
    for attribute in tensor.__tensor_flatten__()[0]:
        if isinstance(inner := getattr(tensor, attribute), Tensor):
            yield from _parts(f"{name}.{attribute}", inner)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    crowded = set()
    for device in {t.device for t in tensors if t.device.type == "cuda"}:
        needed = sum(t.nbytes for t in tensors if t.device == device)
        if needed > 0.9 * torch.cuda.mem_get_info(device)[0]:
            crowded.add(device)
    with torch.no_grad():
        return [
            torch.empty_like(t, device="cpu", pin_memory=True).copy_(t) if t.device in crowded else t.clone()
            for t in tensors
        ]


def _check_restorable(name: str, value: Any) -> None:
    """Raises unless a value is a tensor, a number, or a container of numbers."""
    if isinstance(value, (Tensor, *PLAIN)):
        return
    inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    if not isinstance(inside, (list, tuple)) or any(isinstance(each, Tensor) for each in inside):
        what = f"a {type(value).__name__}" + (" of tensors" if isinstance(inside, (list, tuple)) else "")
        raise TypeError(f"optimizer: {name!r} is {what}, which could not be put back after an update")
    for each in inside:
        _check_restorable(name, each)


def _refill(there: dict[str, Any], held: Mapping[str, Any]) -> None:
    """Makes a dict hold what it held; tensors, which are put back in place, and numbers as they are."""
    there.clear()
    there |= {
        name: value if isinstance(value, (Tensor, *PLAIN)) else copy.deepcopy(value) for name, value in held.items()
    }
