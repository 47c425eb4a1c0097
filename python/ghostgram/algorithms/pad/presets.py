"""The published settings of PAD, by data set and images per class, and small ones of our own."""

from __future__ import annotations

from typing import Any

from ghostgram.algorithms.pad.settings import Settings

Row = tuple[Any, ...]

# alpha, N, M, T-, T, T+, X, batch, lr of labels, lr of images. An "interval" i of the paper's table is X = i (T+ - T).
_PAPER: dict[str, dict[int, Row]] = {
    "c10": {
        1: (0, 80, 2, 0, 4, 4, None, 10, 5, 100),
        10: (0.25, 80, 2, 0, 10, 20, 1000, 100, 2, 100),
        50: (0.25, 80, 2, 0, 20, 40, 2000, 500, 2, 1000),
        500: (0.5, 80, 2, 40, 60, 60, None, 1000, 10, 50),
        1000: (0.75, 80, 2, 40, 60, 60, None, 1000, 10, 50),
    },
    "c100": {
        1: (0, 40, 3, 0, 10, 20, 1000, 100, 10, 1000),
        10: (0.25, 80, 2, 0, 20, 40, 2000, 1000, 10, 1000),
        50: (0.5, 80, 2, 40, 60, 80, 2000, 1000, 10, 1000),
        100: (0.5, 80, 2, 40, 80, 80, None, 1000, 10, 50),
    },
    "tiny": {
        1: (0, 60, 2, 0, 15, 30, 6000, 200, 10, 10_000),
        10: (0.25, 60, 2, 0, 20, 40, 2000, 250, 10, 100),
        50: (0.5, 60, 2, 20, 40, 60, 2000, 250, 10, 100),
    },
}
# What the released configuration files have instead.
_RELEASED: dict[str, dict[int, dict[str, Any]]] = {
    "c10": {
        1: {"lr_beta": 1e-7, "threshold": 1.1},
        10: {"alpha": 0.5},
        50: {"target_epochs": 3},
        500: {"steps": 40, "start_end": 70, "expand_iters": 2000},
        1000: {"steps": 100, "alpha": 0.5},
    },
    "c100": {
        1: {"alpha": 0.5, "start_bound": 20, "start_end": 30, "expand_iters": 1000},
        10: {"alpha": 0.5, "start_bound": 30, "start_end": 50, "expand_iters": 2000},
        50: {"alpha": 0.0, "start_first": 20, "start_bound": 70, "start_end": 70, "expand_iters": None, "init": "real"},
        100: {"start_first": 30, "start_bound": 70, "start_end": 70, "expand_iters": None},
    },
    "tiny": {
        1: {"alpha": 0.5, "steps": 40, "start_bound": 15, "start_end": 20, "expand_iters": 2000},
        10: {
            "alpha": 0.5, "steps": 40, "start_first": 10, "start_bound": 50, "start_end": 50, "expand_iters": None,
            "batch": 500,
        },
        50: {
            "steps": 20, "start_first": 40, "start_bound": 70, "start_end": 70, "expand_iters": None, "batch": 1000,
        },
    },
}  # fmt: skip
_COMMON: dict[str, dict[str, Any]] = {  # the removals of c100 and tiny are ours: the paper names none
    "c10": {"add_end": 20, "removals": ((40, 0.1), (60, 0.2))},
    "c100": {"add_end": 40, "removals": ((60, 0.1), (80, 0.2))},
    "tiny": {"add_end": 40, "removals": ((60, 0.1), (80, 0.2)), "lr_beta": 1e-4, "depth": 4},
}

# Starting values of our own, hardly tuned: benchmarks/algorithms/pad_experiment.py has what they give.
_DIGITS: dict[int, Row] = {
    1: (0.25, 20, 2, 0, 4, 12, 100, None, 2, 50),
    10: (0.25, 20, 2, 0, 4, 12, 100, None, 2, 100),
}
_FASHION: Row = (0.25, 20, 1, 0, 4, 10, 200, 100, 2, 50)
_ON_DIGITS: dict[str, Any] = {
    "whitening": "standard", "width": 32, "depth": 2, "beta": 0.02, "experts": 5, "expert_epochs": 24,
    "expert_batch": 32, "add_end": 3, "scorer_runs": 5, "scorer_epoch": 5, "full_epochs": 20,
}  # fmt: skip
_DIGITS_LENGTHS: dict[int, dict[str, Any]] = {
    1: {"iterations": 300, "eval_every": 100, "eval_epochs": 301},
    10: {"iterations": 150, "eval_every": 75, "eval_epochs": 201},
}
_ON_FASHION: dict[str, Any] = {
    "whitening": "standard", "width": 32, "depth": 3, "experts": 5, "expert_epochs": 15, "expert_batch": 64,
    "add_end": 4, "scorer_runs": 3, "scorer_epoch": 3, "eval_epochs": 201, "full_epochs": 20,
}  # fmt: skip
_FASHION_LENGTHS: dict[int, dict[str, Any]] = {
    1: {"iterations": 300, "eval_every": 150},
    10: {"iterations": 150, "eval_every": 75},
}


def by_name() -> dict[str, Settings]:
    """All presets by name: `<set>-<ipc>-paper` and `-yaml` of c10, c100 and tiny; `digits-` and `fashion-<ipc>`."""
    found = {}
    for data, rows in _PAPER.items():
        for ipc, row in rows.items():
            found[f"{data}-{ipc}-paper"] = _settings(row, ipc=ipc, **_COMMON[data])
            found[f"{data}-{ipc}-yaml"] = _settings(row, **{"ipc": ipc, **_COMMON[data], **_RELEASED[data][ipc]})
    for ipc in (1, 10):
        found[f"digits-{ipc}"] = _settings(_DIGITS[ipc], ipc=ipc, **_ON_DIGITS, **_DIGITS_LENGTHS[ipc])
        found[f"fashion-{ipc}"] = _settings(_FASHION, ipc=ipc, **_ON_FASHION, **_FASHION_LENGTHS[ipc])
    for ipc in (10, 50):
        found[f"fashion-{ipc}-full"] = _settings(_PAPER["c10"][ipc], ipc=ipc, **_COMMON["c10"])
    return found


def preset(name: str) -> Settings:
    """The settings of one preset.

    Args:
        name: Such as "c10-10-paper" (the paper's Table 7), "c10-10-yaml" (the released configuration files; which of
            the two made the paper's main table is not known), "digits-10", "fashion-10-full".

    Returns:
        Settings that `pad(..., preset=...)` takes, as they are or changed by `dataclasses.replace`.

    Raises:
        ValueError: There is no such preset; the message lists them.

    Source:
        PAD (arXiv 2408.03360), Table 7 and its release; digits and fashion are ours.
    """
    known = by_name()
    if name not in known:
        raise ValueError(f"preset: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


def without_pad(settings: Settings) -> Settings:
    """The same with neither filter of PAD, which is DATM: experts see all data in every epoch, all is matched."""
    return Settings.from_mapping(
        {"recipe": "datm", "init_ratio": 1.0, "add_end": 0, "removals": (), "mask": "none", "alpha": 0.0}, settings
    )


def _settings(row: Row, **more: Any) -> Settings:
    names = (
        *("alpha", "steps", "target_epochs", "start_first", "start_bound", "start_end", "expand_iters", "batch"),
        *("lr_labels", "lr_images"),
    )
    return Settings.from_mapping({**dict(zip(names, row, strict=True)), **more})
