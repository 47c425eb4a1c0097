"""Optimizer states as trainers save them, brought back to the parameters they belong to, by name.

A state under the wrong parameter is not noticed by anything that follows: labels would be noise. So everything is
checked that can be: names, group sizes, shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostgram.algorithms.mates.labels.optimizer_state import listed

Groups = Sequence[Sequence[str]]


def load_numbered(
    model: nn.Module,
    saved: str | Path | Mapping[str, Any],
    groups: Groups | None = None,
    kind: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = torch.optim.AdamW,
) -> torch.optim.Optimizer:
    """An optimizer from `optimizer.state_dict()`, which knows its parameters by number alone.

    That is what transformers' Trainer writes as `optimizer.pt` and accelerate as `optimizer.bin`. Numbers count
    through the groups in their order, so the groups must be those of the run that saved the file.

    Args:
        model: The model of the checkpoint, its weights loaded.
        saved: The file, read without running code from it, or the state dict itself.
        groups: The names of the parameters of each group, in order. None for the Trainer's: `trainer_groups(model)`.
        kind: The optimizer's class.

    Returns:
        The optimizer over the model's parameters, with the saved states and settings.

    Raises:
        ValueError: Names, numbers or shapes do not fit; those that do not are listed.
    """
    state = saved if isinstance(saved, Mapping) else torch.load(saved, map_location="cpu", weights_only=True)
    names = trainer_groups(model) if groups is None else [list(group) for group in groups]
    parameters = dict(model.named_parameters())
    trainable = [name for name, p in parameters.items() if p.requires_grad]
    flat = [name for group in names for name in group]
    _refuse("groups: not parameters of the model", [name for name in flat if name not in parameters])
    _refuse("groups: named twice", {name for name in flat if flat.count(name) > 1})
    _refuse("groups: trainable, but in none", [name for name in trainable if name not in flat])
    numbers = [list(group["params"]) for group in state["param_groups"]]
    if (theirs := [len(group) for group in numbers]) != (ours := [len(group) for group in names]):
        raise ValueError(
            f"groups: expected {theirs} parameters, as the saved state has them, got {ours}: give the groups of the "
            "run that saved it"
        )
    pairs = [
        (name, n)
        for group, of_group in zip(names, numbers, strict=True)
        for name, n in zip(group, of_group, strict=True)
    ]
    unlike = {
        name: f"{name} {tuple(parameters[name].shape)} would get the {what} {tuple(value.shape)} of number {number}"
        for name, number in pairs
        for what, value in state["state"].get(number, {}).items()
        if isinstance(value, Tensor) and value.dim() and value.shape != parameters[name].shape
    }
    _refuse("groups: the order is not the saved one", unlike.values())
    if state["state"]:  # plain SGD has none
        _refuse("saved: no state of", [name for name, n in pairs if n not in state["state"] and name in trainable])
    optimizer = kind([{"params": [parameters[name] for name in group]} for group in names])
    optimizer.load_state_dict(dict(state))
    return optimizer


def trainer_groups(model: nn.Module) -> list[list[str]]:
    """The names of the two groups that transformers' Trainer makes: with weight decay, and without.

    The rule is that of the installed version; older ones kept other normalisation layers out of the decay.
    """
    try:
        from transformers import Trainer
    except ImportError as why:
        raise ImportError("the Trainer's groups are transformers' to know: pip install 'ghostgram[hf]'") from why
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    return [[name for name in trainable if (name in decayed) == decays] for decays in (True, False)]


def load_sharded(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: str | Path,
    *,
    weights: str | None = "model",
    state: str = "optim",
) -> None:
    """Weights and states from a folder that `torch.distributed.checkpoint` wrote, by fully qualified names.

    The checkpoint may have been written by any number of processes, and the model may be sharded (`fully_shard`) or
    not: every process reads the parts that it holds, and all must call this together. Each group of the optimizer takes
    the settings that its parameters had when they were saved, however groups were ordered then.

    Args:
        model: The model, which is overwritten.
        optimizer: Over its trainable parameters; its state is overwritten.
        folder: The checkpoint.
        weights: Under which key the model was saved; None leaves the weights as they are.
        state: Under which key the optimizer's state dict was saved, nested or flattened.

    Raises:
        ValueError: A name is missing or left over, a shape differs, or one group's parameters had different settings.
            Nothing has been written then.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    held = FileSystemReader(folder).read_metadata().state_dict_metadata
    parameters = {_plain(name): p for name, p in model.named_parameters()}
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    entries = [
        (key, *key.removeprefix(f"{state}.state.").rsplit(".", 1)) for key in held if key.startswith(f"{state}.state.")
    ]
    saved = {name for _, name, _ in entries}
    if saved or not isinstance(optimizer, torch.optim.SGD):
        _refuse(f"{folder}: no {state}.state of", [name for name in trainable if name not in saved])
    _refuse(f"{folder}: {state}.state of what is not trainable here", saved - trainable.keys())
    sizes = {key: getattr(held[key], "size", torch.Size()) for key, _, _ in entries}
    unlike = [
        f"{name} {tuple(trainable[name].shape)} would get a {what} {tuple(sizes[key])}"
        for key, name, what in entries
        if sizes[key] not in (torch.Size(), trainable[name].shape)
    ]
    _refuse(f"{folder}: other shapes", unlike)
    room: dict[str, Any] = {}
    if weights is not None:
        room |= {f"{weights}.{_plain(name)}": tensor for name, tensor in model.state_dict().items()}
        _refuse(f"{folder}: does not hold", [key for key in room if key not in held])
    settings = {key: _room(held[key], None) for key in held if key.startswith(f"{state}.param_groups.")}
    load(settings, checkpoint_id=folder)
    of_groups = _settings(settings, f"{state}.param_groups.", optimizer, {p: name for name, p in parameters.items()})

    room |= {key: _room(held[key], trainable[name]) for key, name, _ in entries}
    load(room, checkpoint_id=folder)
    for group, values in zip(optimizer.param_groups, of_groups, strict=True):
        group.update(values)
    optimizer.state.clear()
    for key, name, what in entries:
        optimizer.state[trainable[name]][what] = room[key]


def _settings(
    flat: Mapping[str, Any], prefix: str, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> list[dict[str, Any]]:
    """What each group of the optimizer is to be set to."""
    saved: dict[str, dict[str, Any]] = {}  # by number of the group, or by name of the parameter
    for key, value in flat.items():
        owner, what = key.removeprefix(prefix).rsplit(".", 1)
        saved.setdefault(owner, {})[what] = value
    of_names = {name: owner for owner, values in saved.items() for name in values.pop("params", [owner])}
    found = []
    for index, group in enumerate(optimizer.param_groups):
        mine = [names[p] for p in group["params"]]
        _refuse(f"{prefix}: says nothing of", [name for name in mine if name not in of_names])
        each = [saved[of_names[name]] for name in mine]
        if other := next((name for name, values in zip(mine, each, strict=True) if values != each[0]), None):
            raise ValueError(
                f"optimizer: group {index} has {mine[0]} and {other}, which were saved with different settings: "
                "give each its own group"
            )
        found.append(dict(each[0]) if each else {})
    return found


def _room(described: Any, parameter: Tensor | None) -> Any:
    """A tensor to load into, sharded as its parameter is; None for what is no tensor."""
    if not hasattr(described, "size"):
        return None
    if parameter is not None and described.size == parameter.shape:
        return torch.zeros_like(parameter.detach(), dtype=described.properties.dtype)
    return torch.zeros(described.size, dtype=described.properties.dtype)


def _plain(name: str) -> str:
    """A parameter's name without what wrappers add to it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "").removeprefix("module.")


def _refuse(what: str, names: Iterable[str]) -> None:
    if found := sorted(names):
        raise ValueError(f"{what}: {listed(found)}")
