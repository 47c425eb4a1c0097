"""What a call costs where there is next to nothing to compute: T = 1, B = 2, d = p = 4.

Beside each other in alternating rounds, microseconds a call: an empty pybind11 function of as many arguments; the
kernel on prepared arrays (`ghostgram._C.cpu.<op>`, outputs allocated); the front door; `torch.ops.ghostgram.<op>`, and
its own floor, an op registered from Python with the same schema that only allocates the results.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pybind11
import pytest
import torch

import ghostgram as gg
from ghostgram import _C
from ghostgram.ops import _torch
from ghostgram.testing.turns import alternated

CALLS, ROUNDS = 100, 30
MOST_ARGUMENTS = 13
ADAM = (1e-3, 0.9, 0.95, 1e-8, 0.4, 0.2)

rng = np.random.default_rng(0)
a, b, x, m = (rng.standard_normal(shape, dtype=np.float32) for shape in ((2, 1, 4), (2, 1, 4), (2, 1, 4), (4, 4)))
D, row, clip = m[None].copy(), m[:1].copy(), np.ones(2, np.float32)
norms, more_norms, dots, scalar = (np.zeros(shape, np.float32) for shape in ((2,), (2,), (2, 1), ()))
weight, features = np.zeros((4, 4), np.float32), [np.zeros(4, np.float32) for _ in range(2)]
per_token = [np.zeros((2, 1), np.float32) for _ in range(4)]
labels, bad_row, scores = np.ones((2, 1), np.int64), np.zeros((), np.int64), np.ones(2, np.float32)
words = np.zeros(5, np.int64)
reservoir = (np.zeros(1024), np.zeros(1024, np.int64), words[:1], np.full(1, -np.inf), words[1:])

PREPARED: dict[str, tuple[Any, ...]] = {
    "grad_stats": (a, b, D, weight, norms, dots, False),
    "grad_gram": (a, b, None, None, weight[:2, :2]),
    "embedding_stats": (labels, b, D, norms, dots, -1),
    "affine_stats": (b, x, None, norms[:, None], row, row, *features, norms, more_norms, dots, dots, False),
    "gumbel_topk": (scores, np.arange(2), *reservoir, 1, 0, 1.0, False, True),
    "grad_project": (a, b, m, m, np.zeros((2, 4, 4), np.float32), "rademacher", 0, 0, 0),
    "softmax_stats": (a, labels, *per_token, bad_row, -100),
    "trajectory_match": ([a], [b], [x], None, None, scalar, np.zeros(4), None, None, 0),
    "adam_dots": (a, b, clip, m, m * m, D, dots, *ADAM),
}
"""Arguments of every op's kernel: (*inputs, *outputs, *options)."""

Make = Callable[[Any], Any]
DOORS: dict[str, tuple[str, Callable[[Make], Callable[[], Any]]]] = {
    "grad_norms": ("grad_gram", lambda to: partial(gg.grad_norms, to(a), to(b))),
    "grad_dots": ("grad_stats", lambda to: partial(gg.grad_dots, to(a), to(b), to(D))),
    "grad_stats": ("grad_stats", lambda to: partial(gg.grad_stats, to(a), to(b), to(D))),
    "grad_gram": ("grad_gram", lambda to: partial(gg.grad_gram, to(a), to(b))),
    "embedding_stats": ("embedding_stats", lambda to: partial(gg.embedding_stats, to(labels), to(b), to(D))),
    "affine_stats": ("affine_stats", lambda to: partial(gg.affine_stats, to(b), to(x), None, None, to(row), to(row))),
    "gumbel_topk": ("gumbel_topk", lambda to: partial(gg.gumbel_topk, to(scores), 1)),
    "grad_project": ("grad_project", lambda to: partial(gg.grad_project, to(a), to(b), to(m), to(m))),
    "softmax_stats": ("softmax_stats", lambda to: partial(gg.softmax_stats, to(a), to(labels))),
    "trajectory_match": ("trajectory_match", lambda to: partial(gg.trajectory_match, [to(a)], [to(b)], [to(x)])),
    "adam_dots": ("adam_dots", lambda to: partial(gg.adam_dots, to(a), to(b), to(clip), to(m), to(m * m), to(D), ADAM)),
}
"""Front door -> the op whose kernel it calls, and the call on arrays of one framework."""

OPS: dict[str, tuple[Any, ...]] = {
    "grad_norms": (a, b, "G"),
    "grad_stats": (a, b, D, True, True),
    "grad_gram": (a, b, None, None, False),
    "embedding_stats": (labels, b, D, -1, True),
    "affine_stats": (b, x, None, None, row, row, False, True),
    "gumbel_topk": (scores, None, 1, 0, 1.0),
    "grad_project": (a, b, m, m, 4, 4, "rademacher", 0, 0),
    "softmax_stats": (a, labels, -100),
    "trajectory_match": ([a], [b], [x], None, None, 0),
    "adam_dots": (a, b, clip, m, m * m, D, list(ADAM)),
}
"""Arguments of `torch.ops.ghostgram.*`."""


def to_torch(given: Any) -> Any:
    """NumPy arrays, lists of them too, as tensors of the same memory."""
    if isinstance(given, list):
        return [to_torch(each) for each in given]
    return torch.from_numpy(given) if isinstance(given, np.ndarray) else given


@pytest.fixture(scope="module")
def floor(tmp_path_factory) -> Any:
    """A module whose f<n> takes n handles and does nothing."""
    folder = tmp_path_factory.mktemp("floor")
    functions = "\n".join(
        f'm.def("f{n}", []({", ".join(["pybind11::handle"] * n)}) {{}});' for n in range(MOST_ARGUMENTS + 1)
    )
    source, library = folder / "floor.cpp", folder / f"floor{sysconfig.get_config_var('EXT_SUFFIX')}"
    source.write_text(f"#include <pybind11/pybind11.h>\nPYBIND11_MODULE(floor, m) {{\n{functions}\n}}\n")
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    command = ["c++", "-O3", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", *includes]
    subprocess.run([*command, source, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("floor", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def registered() -> dict[str, Any]:
    """For every torch op of ours one that allocates the same results, and does no more."""
    _torch.register()
    library = torch.library.Library("ghostgram_floor", "DEF")
    for name in OPS:
        library.define(str(getattr(torch.ops.ghostgram, name).default._schema).partition("::")[2])
        library.impl(name, _torch._defined[name][2], "CompositeExplicitAutograd")
    yield {name: getattr(torch.ops.ghostgram_floor, name).default for name in OPS}
    library._destroy()


def seconds_a_call(call: Callable[[], Any]) -> float:
    """Of this thread's own processor time, for it works alone: when its turn comes is not the call's doing."""
    started = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - started) / CALLS


def microseconds(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    return {name: 1e6 * s for name, s in alternated(seconds_a_call, ways, rounds=ROUNDS).items()}


@pytest.mark.parametrize("op", PREPARED)
def bench_prepared(benchmark, note, floor, op):
    kernel, numpy_args = getattr(_C.cpu, op), PREPARED[op]
    torch_args = [to_torch(x) for x in numpy_args]
    benchmark(partial(kernel, *numpy_args))
    found = microseconds({
        "floor_us": partial(getattr(floor, f"f{len(numpy_args)}"), *numpy_args),
        "numpy_us": partial(kernel, *numpy_args),
        "torch_us": partial(kernel, *torch_args),
    })  # fmt: skip
    note(prepared=op, **found)


@pytest.mark.parametrize("door", DOORS)
def bench_front_door(benchmark, note, door):
    op, call = DOORS[door]
    benchmark(call(np.asarray))
    found = microseconds({
        "prepared_us": partial(getattr(_C.cpu, op), *PREPARED[op]),
        "numpy_us": call(np.asarray),
        "torch_us": call(torch.from_numpy),
    })  # fmt: skip
    note(front_door=door, **found)


@pytest.mark.parametrize("op", OPS)
def bench_torch_op(benchmark, note, registered, op):
    ours, args = getattr(torch.ops.ghostgram, op).default, [to_torch(x) for x in OPS[op]]
    benchmark(partial(ours, *args))
    add = partial(torch.add, args[0], args[0]) if isinstance(args[0], torch.Tensor) else partial(torch.add, *args[0], 1)
    found = microseconds({"floor_us": partial(registered[op], *args), "ours_us": partial(ours, *args), "add_us": add})
    note(torch_op=op, **found)
