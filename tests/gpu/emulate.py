"""emulate.py SIDE OP: runs an op's kernels without a GPU, in a process of its own, and prints what it found.

SIDE is "cuda" (the sources of csrc on the card of tests/simt) or "triton" (Triton's interpreter). Reads lines "kind
name path" from its input, split by tabs: kind "cases" runs all cases and checks on the unedited kernel at that path,
kind "mutant" the showing ones until one fails. Answers with lines of JSON: [name, complaint], empty if all is well.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import ghostgram
from ghostgram import _arrays, _dispatch
from ghostgram.testing import compare, layouts
from gpu import cases_of_spec, spec_of
from simt.card import Card, Settings


class Cuda:
    """The extension module at a path, on the card."""

    # Two runs of which no bit may differ: other schedules, other cards' shared memory, other alignments.
    runs = (Settings(1, 100, at_end=True), Settings(2, 228, at_end=False))

    def __init__(self, op: str, path: Path) -> None:
        self._path = path
        sys.setdlopenflags(os.RTLD_LAZY)  # other ops' kernels are missing, and are never called
        module = _loaded(f"{path.stem}._C", path)  # pybind11 gives a name that it knows the first module again
        sys.modules["ghostgram._C"] = ghostgram._C = module
        _forget()
        _arrays.device_type = lambda _: "cuda"

    @contextmanager
    def run(self, settings: Settings) -> Iterator[layouts.Make]:
        """Everything that is allocated meanwhile lies between guard pages."""
        plain = _arrays.empty, layouts.poisoned, layouts.poisoned_sums
        with Card(self._path, settings) as card:

            def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
                return card.empty(shape, dtype) if _arrays.is_torch(like) else plain[0](like, shape, dtype)

            def poisoned(like: Any, shape: tuple[int, ...] | None = None) -> Any:
                if not _arrays.is_torch(like):
                    return plain[1](like, shape)
                dtype = _arrays.dtype_name(like)
                return card.empty(tuple(like.shape) if shape is None else shape, dtype, layouts.ITEM[dtype])

            def poisoned_sums(like: Any, shape: tuple[int, ...]) -> Any:
                if not _arrays.is_torch(like):
                    return plain[2](like, shape)
                dtype = _arrays.sum_dtype(like)
                return card.empty(shape, dtype, layouts.ITEM[dtype])

            _arrays.empty, layouts.poisoned, layouts.poisoned_sums = empty, poisoned, poisoned_sums
            try:
                yield card.array
            finally:
                _arrays.empty, layouts.poisoned, layouts.poisoned_sums = plain


class Triton:
    """The Triton kernels at a path, interpreted, on memory that torch fills with NaN."""

    runs = (None,)

    def __init__(self, op: str, path: Path) -> None:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        name = f"ghostgram.triton_kernels.{op}"
        sys.modules[name] = _loaded(name, path)
        _forget()

    @contextmanager
    def run(self, _: None) -> Iterator[layouts.Make]:
        """The interpreter has one schedule and no guard pages."""
        yield layouts.torch_array


def _loaded(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _forget() -> None:
    for cached in (_dispatch.why_not, _dispatch._runnable, _dispatch.choose, _dispatch._runner):
        cached.cache_clear()


def complaint(op: str, side: str, machine: Any, case: Any, dtype: str) -> str:
    """What is wrong with the kernel on a case; empty when nothing is."""
    cases = compare.cases_of(op)
    values = cases.inputs(case, dtype)
    expected = cases.run(case, cases.arrays(case, values, layouts.numpy_array, "float64"), "reference")
    bits: list[dict[str, bytes]] = []
    for settings in machine.runs:
        try:
            with machine.run(settings) as make:
                computed = cases.run(case, cases.arrays(case, values, make, dtype), side)
                worst = compare.compare(computed, expected, cases.scales(case, values), cases.bound(case, dtype))
                bits.append({name: _arrays.to_float64(x).tobytes() for name, x in computed.items()})
        except (RuntimeError, AssertionError) as error:
            return f"{case.id}: {error}"
        for name, error in worst.items():
            if not error <= 1:
                return f"{case.id}: {name} is beyond its bound, by a factor of {error:.3g}"
    for name in bits[0]:
        if bits[0][name] != bits[-1][name]:
            return f"{case.id}: {name} has other bits with {machine.runs[-1]}"
    return ""


def refusal_of_float64(op: str, side: str, machine: Any, case: Any) -> str:
    """What is wrong with the error that float64 inputs raise."""
    cases = compare.cases_of(op)
    with machine.run(machine.runs[0]) as make:
        made = cases.arrays(case, cases.inputs(case, "float64"), make, "float64")
        try:
            cases.run(case, made, side)
        except ValueError as error:
            return "" if "float64" in str(error) and "cpu" in str(error) else f"a message that does not help: {error}"
    return "float64 was not refused"


def check(machine: Any, function: Callable[[layouts.Make], None]) -> str:
    """What a check of the op's own complains of."""
    try:
        with machine.run(machine.runs[0]) as make:
            function(make)
    except (RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    side, op = sys.argv[1:]
    spec = getattr(spec_of(op), side.upper())

    def answer(name: str, what: str) -> None:
        print(json.dumps([name, what]), flush=True)

    for line in sys.stdin:
        kind, name, path = line.rstrip("\n").split("\t")
        machine = (Cuda if side == "cuda" else Triton)(op, Path(path))
        if kind == "mutant":
            dtype = spec.mutants[name].dtype if name in spec.mutants else "float32"
            answer(name, next(filter(None, (complaint(op, side, machine, case, dtype) for case in spec.showing)), ""))
            continue
        for case in cases_of_spec(op, spec):
            for dtype in spec.dtypes:
                answer(f"{case.id}-{dtype}", complaint(op, side, machine, case, dtype))
        if "float64" not in spec.dtypes:
            answer("float64 is refused", refusal_of_float64(op, side, machine, spec.showing[0]))
        for title, function in spec.checks.items():
            answer(title, check(machine, function))


if __name__ == "__main__":
    main()
