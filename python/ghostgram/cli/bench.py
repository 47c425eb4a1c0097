"""What `ghostgram bench` finds out: how fast every op is here, on every backend, beside plain expressions and roofs."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from ghostgram import _C, _dispatch
from ghostgram.cli.doctor import installed
from ghostgram.testing import layouts, plain, roofline, turns
from ghostgram.testing.compare import cases_of, error_over_bound

BACKENDS = tuple(backend for backend in _dispatch.BACKENDS if backend != "reference")
CACHES = ("warm", "cold")


@dataclass(frozen=True)
class Row:
    """One way to compute an op, at one shape, from warm or cold caches."""

    op: str
    shape: str
    dtype: str
    cache: str
    way: str
    """A backend of ours, or what a plain expression does."""
    ours: bool
    seconds: float
    intensity: float
    """FLOPs per byte that a perfect kernel moves; the same for all ways."""
    gflops: float
    gbytes: float
    percent_of_roof: float | None
    """Of what this processor's measured roofs allow; None for ways that do other work, and on a GPU."""
    error_over_bound: float | None
    """The worst error of ours in units of the derived bound, at most 1; None for plain expressions."""


@dataclass(frozen=True)
class Findings:
    """All findings, ready for JSON."""

    processor: str
    isa: str
    threads: int
    versions: dict[str, str]
    roofs: roofline.Roofs
    dtype: str
    absent: dict[str, dict[str, str]]
    """op -> backend -> why it is not here."""
    rows: list[Row]

    @property
    def right(self) -> bool:
        """Whether every result of ours lies within its bound."""
        return all(row.error_over_bound is None or row.error_over_bound <= 1 for row in self.rows)


def examine(ops: Iterable[str], dtype: str, seconds: float, note: Callable[[str], None]) -> Findings:
    """Validates and times ops.

    Args:
        ops: Which ones.
        dtype: Of the inputs: "float32", "float64", "bfloat16" or "float16".
        seconds: How long each roof is measured, and each op at each shape is timed.
        note: Called with what comes next.
    """
    if find_spec("torch"):
        _C.borrow_openmp()  # as the front doors do: workers beside torch's own would get half a core
    note("roofs")
    roofs = roofline.measure(seconds, dtype)
    absent: dict[str, dict[str, str]] = {}
    rows: list[Row] = []
    for op in ops:
        absent[op] = {backend: why for backend in BACKENDS if (why := _why_not(op, backend, dtype))}
        backends = [backend for backend in BACKENDS if backend not in absent[op]]
        typical = cases_of(op).TYPICAL
        for case, shape in zip(typical, _names(typical), strict=True):
            note(f"{op} {shape}")
            rows += _rows(op, case, shape, dtype, backends, seconds)
    note("roofs")
    roofs = _higher(roofs, roofline.measure(seconds, dtype))
    return Findings(
        processor=roofline.processor(),
        isa=_C.isa(),
        threads=_C.num_threads(),
        versions={"python": platform.python_version()}
        | {name: version for name in ("numpy", "torch") if (version := installed(name))},
        roofs=roofs,
        dtype=dtype,
        absent=absent,
        rows=[_under(roofs, row) for row in rows],
    )


def _higher(*found: roofline.Roofs) -> roofline.Roofs:
    """The best of each rate: what a busy machine could not show at one moment, it may at another."""
    return roofline.Roofs(*(max(rates) for rates in zip(*map(dataclasses.astuple, found), strict=True)))


def _under(roofs: roofline.Roofs, row: Row) -> Row:
    if row.way != "cpu":
        return row
    flops, moved = 1e9 * row.gflops * row.seconds, 1e9 * row.gbytes * row.seconds
    return dataclasses.replace(row, percent_of_roof=roofline.percent_of_roof(flops, moved, row.seconds, roofs))


def _why_not(op: str, backend: str, dtype: str) -> str | None:
    if why := _dispatch.why_not(op, backend):
        return why
    if backend == "triton" and _dispatch._interpreted():
        return "interpreted, which says nothing about its speed"
    if backend != "cpu" and dtype == "float64":
        return "float64 is for the CPU alone"
    return None


def _names(cases: list[Any]) -> list[str]:
    """The cases' ids, less what all of them have in common."""
    ids = [case.id.split("-") for case in cases]
    shared = set.intersection(*map(set, ids)) if len(ids) > 1 else set()
    return ["-".join(part for part in parts if part not in shared) for parts in ids]


def _rows(op: str, case: Any, shape: str, dtype: str, backends: list[str], seconds: float) -> Iterator[Row]:
    with_torch = find_spec("torch") is not None
    cases = cases_of(op)
    values = cases.inputs(case, dtype)
    for device in sorted({"cpu" if backend == "cpu" else "cuda" for backend in backends}):
        here = [backend for backend in backends if (backend == "cpu") == (device == "cpu")]
        make = layouts.array_for(here[0]) if with_torch else layouts.numpy_array
        errors = {backend: max(error_over_bound(op, case, dtype, backend, make).values()) for backend in here}
        made = cases.arrays(case, values, make, dtype)
        ways: dict[str, Callable[[], Any]] = {backend: _prepared(op, case, made, backend) for backend in here}
        ways |= plain.expressions(op, case, made)
        clock = _Clock(device)
        for cache in CACHES:
            times = turns.within(seconds, partial(clock, cold=cache == "cold"), ways)
            for way, took in times.items():
                ours = way in errors
                yield Row(
                    op=op,
                    shape=shape,
                    dtype=dtype,
                    cache=cache,
                    way=way,
                    ours=ours,
                    seconds=took,
                    intensity=case.flops / case.bytes(dtype),
                    gflops=case.flops / took / 1e9,
                    gbytes=case.bytes(dtype) / took / 1e9,
                    percent_of_roof=None,
                    error_over_bound=errors.get(way),
                )


def _prepared(op: str, case: Any, made: dict[str, Any], backend: str) -> Callable[[], None]:
    """The room below its front door, into outputs that exist: fresh memory costs page faults that are no kernel's."""
    cases = cases_of(op)
    arguments, _ = cases.call(case, made)
    begin = getattr(cases, "begin", None)

    def call() -> None:
        if begin:
            begin(arguments)
        _dispatch.run(op, backend, *arguments)

    return call


class _Clock:
    """Seconds of a call, on a GPU until it is done; cold ones after memory larger than any cache has been written."""

    def __init__(self, device: str) -> None:
        self._memory = np.ones(turns.CACHE_BYTES // 8)
        self._on_gpu = device == "cuda"

    def __call__(self, call: Callable[[], Any], *, cold: bool) -> float:
        if not self._on_gpu:
            if cold:
                np.add(self._memory, 1, out=self._memory)
            return turns.wall(call)
        import torch

        if cold:
            torch.ones(turns.CACHE_BYTES // 4, device="cuda")
        torch.cuda.synchronize()

        def finished() -> None:
            call()
            torch.cuda.synchronize()

        return turns.wall(finished)


def as_json(found: Findings) -> dict[str, Any]:
    """The findings as plain types."""
    return dataclasses.asdict(found)
