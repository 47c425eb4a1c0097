"""How steps are scored, and which of these wishes cannot be met together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from ghostgram.algorithms.in_run_shapley.validation import ValidationSets

ALLOWED = {
    "order": (1, 2),
    "v_state": ("pre", "post", "secant"),
    "curvature": ("midpoint", "hvp"),
    "late": ("auto", "stored", "replay", "forward"),
    "fallback": ("error", "jvp"),
    "on_audit_failure": ("raise", "mark"),
}


class Settings(NamedTuple):
    """See `InRunShapley`."""

    order: int
    v_state: str
    curvature: str
    late: str
    refresh: int
    audit_every: int
    on_audit_failure: str
    compare_orders: bool
    fallback: str


def check(settings: Settings) -> None:
    """Raises ValueError for what is not offered, whatever the model."""
    for name, allowed in ALLOWED.items():
        if (given := getattr(settings, name)) not in allowed:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {given!r}")
    for name, least in (("refresh", 1), ("audit_every", 0)):
        if (given := getattr(settings, name)) < least:
            raise ValueError(f"{name}: expected at least {least}, got {given}")
    if settings.order == 1 and settings.compare_orders:
        raise ValueError("compare_orders: expected False for order 1, got True")
    if settings.order == 2 and settings.v_state == "pre":
        raise ValueError(
            "v_state: expected 'secant' or 'post' for order 2, whose utility is that of the real step, got 'pre'"
        )
    if settings.order == 2 and settings.refresh > 1:
        raise ValueError(
            f"refresh: expected 1 for order 2, which needs each step's own gradient, got {settings.refresh}"
        )


def check_against(settings: Settings, sets: ValidationSets, parameters: Iterable[nn.Parameter]) -> None:
    """Raises ValueError for what these validation sets or parameters do not allow."""
    if sets.rotates and settings.refresh > 1:
        raise ValueError(f"refresh: expected 1 for a RotatingPool, got {settings.refresh}")
    in_16_bits = any(p.dtype.itemsize == 2 for p in parameters)
    if settings.order == 2 and settings.curvature == "midpoint" and in_16_bits:
        raise ValueError(
            "curvature: expected 'hvp' for 16-bit weights, which would round the way to the middle of the step away, "
            "got 'midpoint'"
        )


def check_sharded(settings: Settings) -> None:
    """Raises ValueError for what cannot be done with the parts of a sharded model."""
    for name, allowed, refused in (
        ("curvature", "midpoint", settings.order == 2 and settings.curvature == "hvp"),
        ("late", "replay", settings.late == "forward"),
        ("fallback", "error", settings.fallback == "jvp"),
        ("audit_every", 0, settings.audit_every > 0),
    ):
        if refused:
            raise ValueError(
                f"{name}: expected {allowed!r} for a model under fully_shard, whose gathered weights carry neither "
                f"forward-mode tangents nor second derivatives, got {getattr(settings, name)!r}"
            )
