"""Everything that a run of PAD is determined by, beside its data and its model."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Settings:
    """The settings of a run; `presets.preset` has the published ones. Epochs count from 0, the initial weights.

    Raises:
        ValueError: A setting is out of its range, or two of them exclude each other; the message names them.
        TypeError: A setting is of another type than said here.
    """

    # The distilled set ---------------------------------------------------------------------------------------------
    ipc: int = 10
    """Distilled images per class."""
    init: Literal["correct", "real"] = "correct"
    """Where images start: at training images that an expert classifies correctly, or at any."""
    labels: Literal["learn", "fixed", "hard"] = "learn"
    """Label logits that are learned, that stay as the experts gave them, or classes."""
    beta: float = 0.01
    """The step size of the student at first; it is learned."""

    # Matching ------------------------------------------------------------------------------------------------------
    steps: int = 80
    """N: steps of the student."""
    target_epochs: int = 2
    """M: how many epochs after its start the expert is to be met."""
    start_first: int = 0
    """T-: the first epoch that students start at."""
    start_bound: int = 10
    """T: students start before this epoch, at first."""
    start_end: int = 20
    """T+: and before this one, at last."""
    expand_iters: int | None = 1000
    """X: the iteration by which the bound has grown from T to T+; None where they are one."""
    batch: int | None = None
    """Distilled images of a student's step; None: all."""
    mask: Literal["depth", "error", "none"] = "depth"
    """Which parameters are matched: all but the front ones (PAD), all but those of least error, or all."""
    alpha: float = 0.25
    """The share of parameters that the mask drops."""
    align: Literal["scalar", "tensor", "block"] = "scalar"
    """Where the depth mask may cut."""
    gradient: Literal["exact", "full", "tesla"] = "exact"
    """How the loss is derived, see `match`."""
    second: Literal["double_backward", "jvp"] = "double_backward"
    """How a step of the exact gradient is derived, see `match`."""
    store: Literal["all", "sqrt", "host"] = "all"
    """Which weights of the student's path are kept, see `match`."""
    chunk: int | None = None
    """Images of a step that are derived at once; None: all."""
    inner_momentum: float = 0.0
    """Of the student."""
    matches: int = 1
    """Experts that are matched in an iteration; their losses are averaged."""

    # Learning the set ----------------------------------------------------------------------------------------------
    iterations: int = 10_000
    """How often the set is matched and moved."""
    lr_images: float = 100.0
    """The step size of SGD on the images."""
    lr_labels: float = 2.0
    """The step size of SGD on the label logits."""
    lr_beta: float = 1e-5
    """The step size of SGD on `beta`."""
    momentum_images: float = 0.5
    """The momentum of SGD on the images."""
    momentum_labels: float = 0.9
    """The momentum of SGD on the label logits."""
    momentum_beta: float = 0.5
    """The momentum of SGD on `beta`."""
    threshold: float = 1.0
    """A match whose loss is above this, or not finite, is left out."""
    checkpoint_every: int = 50
    """Iterations; a killed run goes on from the last of them, with the same bits for any value."""

    # Data ----------------------------------------------------------------------------------------------------------
    whitening: Literal["zca", "standard", "none"] = "zca"
    """What is done to pixels: ZCA; each channel to mean 0 and deviation 1; nothing."""
    zca_eps: float = 0.1
    """What ZCA adds to the variances that it divides by."""
    augment: bool = True
    """DSA, in experts, students and evaluation."""
    val_fraction: float = 0.1
    """The share of the training images that only validation sees."""
    protocol: Literal["validation", "release"] = "validation"
    """"release" picks the best iterate by one net on the test images, as the published code does; for parity alone."""

    # The student, where no model is given ----------------------------------------------------------------------------
    width: int = 128
    """Channels of the ConvNet's layers."""
    depth: int = 3
    """Layers of the ConvNet."""

    # Difficulty ----------------------------------------------------------------------------------------------------
    scorer: str = "el2n"
    """What difficulty is measured by, see `score`."""
    scorer_runs: int = 10
    """Nets whose scores are averaged."""
    scorer_epoch: int = 20
    """The epoch after which they are scored."""
    init_ratio: float = 0.75
    """The share of the easiest images in epoch 0, taken as it is written."""
    add_end: int = 20
    """From this epoch on there are all; 0: from the first."""
    removals: tuple[tuple[int, float], ...] = ()
    """(epoch, share): after that epoch the easiest share is left out."""

    # Experts -------------------------------------------------------------------------------------------------------
    recipe: Literal["pad", "datm", "ftd", "mtt"] = "pad"
    """The others have no schedule; "mtt" is plain SGD."""
    experts: int = 100
    """Nets whose trajectories are matched."""
    expert_epochs: int = 100
    """Epochs that each of them is trained for."""
    expert_batch: int = 256
    """Training images of an expert's step."""
    group: int | None = None
    """Experts that train at once; None: 1 on a CPU, 10 on a GPU."""

    # Evaluation ----------------------------------------------------------------------------------------------------
    eval_every: int = 1000
    """Iterations between two validations; 0: only after the last."""
    eval_nets: int = 5
    """Fresh nets that a set is judged by."""
    eval_epochs: int = 1001
    """Passes over the set that each of them is trained for."""
    eval_batch: int = 128
    """Images of a step of theirs."""
    controls: bool = True
    """Whether other images are judged too: where the distillation began, random and central ones, and all of them."""
    full_epochs: int = 50
    """Passes of nets that are trained on all images; 0: none are."""
    full_beta: float = 0.01
    """Their step size."""

    # Randomness ----------------------------------------------------------------------------------------------------
    seed: int = 0
    """Of everything that is drawn, but for what `data_seed` is of."""
    data_seed: int | None = None
    """Of split, scores and experts; None: `seed`. Runs that differ in `seed` alone can share these."""
    deterministic: bool = True
    """Only kernels that always give the same bits, and no TF32."""

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), kind))
        _check_ranges(self)
        _check_together(self)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any], base: Settings | None = None) -> Settings:
        """Settings from names and values.

        Args:
            given: The values, by name.
            base: What all others are like; None for the defaults.

        Raises:
            ValueError: There is no setting of a name; the message suggests one.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ValueError(f"{name}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
        return dataclasses.replace(base, **given) if base else cls(**given)

    def as_json(self) -> dict[str, Any]:
        """Plain values, by name."""
        return {**dataclasses.asdict(self), "removals": [list(each) for each in self.removals]}

    @property
    def bound_growth(self) -> int:
        """How far the upper bound of start epochs grows."""
        return self.start_end - self.start_bound

    @property
    def kept_epochs(self) -> list[int]:
        """The expert snapshots that matching and initial labels need."""
        return sorted({*range(self.start_first, self.start_end + self.target_epochs), self.expert_epochs})

    @property
    def seed_of_data(self) -> int:
        """The seed of split, scores and experts."""
        return self.seed if self.data_seed is None else self.data_seed

    def start_before(self, iteration: int) -> int:
        """U: students of this iteration start at an epoch before it; `min(T+, T + floor((T+ - T) it / X))`."""
        if self.expand_iters is None:
            return self.start_end
        return min(self.start_end, self.start_bound + self.bound_growth * iteration // self.expand_iters)


@cache
def _kinds() -> dict[str, Any]:
    """The types of the fields by name: found once, since a run and each preset check them."""
    return get_type_hints(Settings)


_LEAST = {
    "ipc": 1, "steps": 1, "target_epochs": 1, "start_first": 0, "expand_iters": 1, "batch": 1, "chunk": 1, "matches": 1,
    "iterations": 1, "checkpoint_every": 1, "width": 1, "depth": 1, "scorer_runs": 1, "scorer_epoch": 1, "add_end": 0,
    "experts": 1, "expert_epochs": 1, "expert_batch": 1, "group": 1, "eval_every": 0, "eval_nets": 1, "eval_epochs": 1,
    "eval_batch": 1, "full_epochs": 0, "seed": 0, "data_seed": 0, "lr_images": 0, "lr_labels": 0, "lr_beta": 0,
}  # fmt: skip
_BELOW_ONE = ("alpha", "inner_momentum", "momentum_images", "momentum_labels", "momentum_beta", "val_fraction")
_POSITIVE = ("beta", "full_beta", "threshold", "zca_eps")


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value as the type that a field asks for; or an error that names both."""
    wanted = get_args(kind) if get_origin(kind) is Literal else None
    if wanted is not None:
        if value not in wanted:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, wanted))}, got {value!r}")
        return value
    if name == "removals":
        return _removals(value)
    kinds = get_args(kind) or (kind,)
    if value is None and type(None) in kinds:
        return None
    for each in kinds:
        if each is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if each is not float and type(value) is each:
            return value
    names = " or ".join("None" if each is type(None) else each.__name__ for each in kinds)
    raise TypeError(f"{name}: expected {names}, got {value!r}")


def _removals(value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of an epoch and a share."""
    try:
        return tuple((int(epoch), float(share)) for epoch, share in value)
    except (TypeError, ValueError) as why:
        raise TypeError(f"removals: expected pairs of an epoch and a share, got {value!r}") from why


def _check_ranges(s: Settings) -> None:
    for name, least in _LEAST.items():
        value = getattr(s, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    for name in _BELOW_ONE:
        if not 0 <= getattr(s, name) < 1:
            raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(s, name)}")
    for name in _POSITIVE:
        if not 0 < getattr(s, name) < math.inf:
            raise ValueError(f"{name}: expected a number above 0, got {getattr(s, name)}")


def _check_together(s: Settings) -> None:
    """What two settings must be to each other."""
    if not s.start_first < s.start_bound <= s.start_end:
        raise ValueError(
            "start_first, start_bound, start_end: expected start_first < start_bound <= start_end, got "
            f"{s.start_first}, {s.start_bound}, {s.start_end}"
        )
    if s.expand_iters is None and s.start_bound != s.start_end:
        raise ValueError(
            f"expand_iters: expected a number of iterations, got None, beside start_bound {s.start_bound} and "
            f"start_end {s.start_end}: say by when the bound has grown"
        )
    last = s.start_end - 1 + s.target_epochs
    if last > s.expert_epochs:
        raise ValueError(
            f"expert_epochs: expected at least {last}, which students that start before epoch {s.start_end} are to "
            f"meet after {s.target_epochs}, got {s.expert_epochs}"
        )
    if s.mask == "none" and s.alpha:
        raise ValueError(f'alpha: expected 0 beside mask "none", which drops nothing, got {s.alpha}')
    if s.protocol == "release" and s.val_fraction:
        raise ValueError(
            f'val_fraction: expected 0 beside protocol "release", which has no validation, got {s.val_fraction}'
        )
    if s.recipe != "pad" and (s.init_ratio, s.add_end, s.removals) != (1, 0, ()):
        raise ValueError(
            f'recipe: "{s.recipe}" has no schedule: expected init_ratio 1, add_end 0 and no removals, got '
            f"{s.init_ratio}, {s.add_end} and {list(s.removals)}"
        )
