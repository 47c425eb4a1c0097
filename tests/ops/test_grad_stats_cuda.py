"""grad_stats_cuda.cu executed thread by thread on the CPU (tests/simt) and compared with the float64 reference."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ghostgram.testing import compare, layouts
from ghostgram.testing.cases import grad_stats as cases
from ghostgram.testing.cases.grad_stats import Case
from simt import shim

pytestmark = pytest.mark.skipif(shim.compiler() is None, reason="no C++ compiler to build the CPU shim with")

DTYPES = ("float32", "bfloat16", "float16")
CODES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
NOT_SUPPORTED = 801

# Multiply-adds of the padded tiles that emulation may take; 30 to 100 million a second.
WORK_LIMIT = 90_000_000

# What the shared cases leave out: blocks with several samples of several stages each, more samples than splits, sums on
# top of sums with one block per tile; large tiles, cut by both edges, with whole and with odd strides.
OWN_CASES = [
    Case(33, 40, 20, 24, 1), Case(1, 5, 33, 20, 1, accumulate=True), Case(2, 40, 136, 130, 2),
    Case(2, 33, 1104, 1000, 1), Case(2, 17, 1101, 1001, 2, accumulate=True),
]  # fmt: skip


class Args(ctypes.Structure):
    """The GradStats of csrc/grad_stats/grad_stats.h."""

    _fields_ = (
        [("dtype", ctypes.c_uint8), ("direction_dtype", ctypes.c_uint8)]
        + [(name, ctypes.c_int64) for name in ("samples", "tokens", "d", "p", "directions")]
        + [("a", ctypes.c_void_p), ("a_sample", ctypes.c_int64), ("a_token", ctypes.c_int64)]
        + [("b", ctypes.c_void_p), ("b_sample", ctypes.c_int64), ("b_token", ctypes.c_int64)]
        + [("D", ctypes.c_void_p), ("D_direction", ctypes.c_int64), ("D_row", ctypes.c_int64)]
        + [("weight_grad", ctypes.c_void_p), ("weight_grad_row", ctypes.c_int64), ("accumulate", ctypes.c_bool)]
        + [("norms2", ctypes.c_void_p), ("dots", ctypes.c_void_p)]
    )


@dataclass(frozen=True)
class Card:
    """What must not change a bit of the results: scheduling, shared memory, alignment of buffers, D's dtype."""

    seed: int
    shared_kib: int
    at_end: bool
    wide_directions: bool
    row_gap: int


CARDS = (Card(1, 100, True, True, 0), Card(2, 228, False, False, 3))

Outputs = dict[str, NDArray[np.float32]]


def run(
    library: shim.Shim, case: Case, dtype: str, card: Card, wanted: tuple[str, ...] = ("weight_grad", "norms2", "dots")
) -> Outputs:
    """Launches the kernel on guarded buffers; an AssertionError for a failed launch or a write beside an output."""
    library.configure(card.seed, card.shared_kib * 1024)
    values = cases.inputs(case, dtype)
    D_dtype = "float32" if card.wide_directions else dtype
    with shim.Buffers(library, card.at_end) as buffers:
        a, (a_sample, a_token, _) = buffers.copy(layouts.lay_out(values["a"], case.layout), dtype)
        b, (b_sample, b_token, _) = buffers.copy(layouts.lay_out(values["b"], case.layout), dtype)
        args = Args(
            CODES[dtype], CODES[D_dtype], case.samples, case.tokens, case.d, case.p, 0,
            a, a_sample, a_token, b, b_sample, b_token, accumulate=case.accumulate,
        )  # fmt: skip
        outputs: Outputs = {}
        if "weight_grad" in wanted:
            row = case.d + card.row_gap
            padded = buffers.empty(case.p * row, "float32").reshape(case.p, row)
            outputs["weight_grad"] = padded[:, : case.d]
            if case.accumulate:
                outputs["weight_grad"][...] = values["weight_grad"]
            args.weight_grad, args.weight_grad_row = padded.ctypes.data, row
        if "norms2" in wanted:
            outputs["norms2"] = buffers.empty(case.samples, "float32")
            args.norms2 = outputs["norms2"].ctypes.data
        if "dots" in wanted and values["D"] is not None:
            directions = layouts.lay_out(values["D"], "contiguous" if case.layout == "expanded" else case.layout)
            args.D, (args.D_direction, args.D_row, _) = buffers.copy(directions, D_dtype)
            args.directions = case.directions
            outputs["dots"] = buffers.empty(case.samples * case.directions, "float32")
            outputs["dots"] = outputs["dots"].reshape(case.samples, case.directions)
            args.dots = outputs["dots"].ctypes.data
        library.library.simt_grad_stats_workspace.restype = ctypes.c_int64
        workspace = buffers.empty(library.library.simt_grad_stats_workspace(ctypes.byref(args)), "uint8")
        code = library.library.simt_grad_stats(ctypes.byref(args), ctypes.c_void_p(workspace.ctypes.data))
        assert code == 0, f"error {code}: {library.error}"
        if "weight_grad" in wanted:
            assert np.isnan(padded[:, case.d :]).all(), "a write between the rows of weight_grad"
        return {name: out.copy() for name, out in outputs.items()}


def error_over_bound(case: Case, dtype: str, outputs: Outputs) -> dict[str, float]:
    """The largest error of each output, in units of the derived bound."""
    values = cases.inputs(case, dtype)
    exact = cases.arrays(case, values, layouts.numpy_array, "float64")
    expected = cases.run(case, exact, "reference")
    wanted = {name: expected[name] for name in outputs}
    return compare.compare(outputs, wanted, cases.scales(case, values), cases.bound(case, dtype))


def padded_work(case: Case) -> int:
    """Multiply-adds with both sides of G rounded up to a tile's."""
    return case.samples * case.tokens * (-(-case.p // 64) * 64) * (-(-case.d // 64) * 64)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shim.build_engine(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="session")
def library(engine: Path) -> shim.Shim:
    return shim.build("grad_stats", engine, engine.parent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*cases.CASES, *OWN_CASES, *cases.LARGE], ids=lambda case: case.id)
def test_equals_reference(library: shim.Shim, case: Case, dtype: str) -> None:
    if padded_work(case) > WORK_LIMIT:
        pytest.skip(f"{padded_work(case):.1e} multiply-adds are too many to emulate")
    first, second = (run(library, case, dtype, card) for card in CARDS)
    worst = error_over_bound(case, dtype, first)
    assert max(worst.values()) <= 1, worst
    for name, values in first.items():
        assert values.tobytes() == second[name].tobytes(), f"{name}: other bits with {CARDS[1]}"


@pytest.mark.parametrize("wanted", [("weight_grad",), ("norms2",), ("dots",), ("norms2", "dots")], ids="+".join)
@pytest.mark.parametrize("case", [Case(3, 5, 29, 31, 2), Case(2, 0, 3, 2, 1)], ids=lambda case: case.id)
def test_outputs_are_optional(library: shim.Shim, case: Case, wanted: tuple[str, ...]) -> None:
    everything = run(library, case, "float32", CARDS[0])
    for name, values in run(library, case, "float32", CARDS[0], wanted).items():
        assert values.tobytes() == everything[name].tobytes()


def test_float64_is_refused(library: shim.Shim) -> None:
    args = Args(CODES["float64"], CODES["float64"], 1, 1, 1, 1, 0)
    assert library.library.simt_grad_stats(ctypes.byref(args), None) == NOT_SUPPORTED


@dataclass(frozen=True)
class Mutant:
    """A fault put into one place of one source, and the cases that must show it."""

    file: str
    old: str
    new: str
    dtype: str = "bfloat16"


KERNEL, TILE, FRAGMENTS = "grad_stats/grad_stats_cuda.cu", "core/tile.cuh", "core/mma.cuh"
MUTANTS = {
    "no barrier before a stage is read": Mutant(KERNEL, "__syncthreads(); // everyone's", "// everyone's"),
    "no barrier before warps' sums are read": Mutant(KERNEL, "__syncthreads(); // the next", "// the next"),
    "no wait for copies": Mutant(KERNEL, "copy_async_wait<stages - 2>();", ""),
    "a wait one stage too short": Mutant(KERNEL, "copy_async_wait<stages - 2>", "copy_async_wait<stages - 1>"),
    "no mask on the last tokens": Mutant(TILE, "token < tokens_left ?", "token <= tokens_left ?"),
    "no mask on the last columns": Mutant(TILE, "most(0, least(n, cols_left - col))", "n"),
    "halves of a row fragment swapped": Mutant(
        FRAGMENTS, "x + (lane % 8 + lane / 16 * 8) * stride", "x + (lane % 8 + (1 - lane / 16) * 8) * stride"
    ),
    "wrong token in a split fragment": Mutant(
        FRAGMENTS, "x[(lane % 4 + e / 2 * 4)", "x[(lane % 4 + e / 2 * 2)", "float32"
    ),
    "a product of the split left out": Mutant(
        FRAGMENTS, "multiply_m16n8k8_tf32(product, rows.high, cols.low);", "", "float32"
    ),
    "weight_grad takes the last sample only": Mutant(KERNEL, "value[i][j][e] += grad", "value[i][j][e] = grad"),
    "partial sums under another tile's index": Mutant(
        KERNEL, "plan.tiles + tile] = sum", "plan.tiles + tile / 2] = sum"
    ),
    "one split not merged": Mutant(KERNEL, "split < at.plan.splits;", "split + 1 < at.plan.splits;"),
    "start of weight_grad forgotten": Mutant(KERNEL, "add ? to[0] + x : x", "x"),
}
SHOWING = [
    Case(1, 1, 1, 1, 1), Case(3, 17, 65, 63, 2), Case(33, 40, 20, 24, 1), Case(1, 5, 33, 20, 1, accumulate=True),
    Case(3, 7, 40, 24, 2, "sliced"), Case(2, 40, 136, 130, 2),
]  # fmt: skip


def _build_mutant(mutant: Mutant, engine: Path, folder: Path) -> shim.Shim:
    for part in ("core", "grad_stats"):
        shutil.copytree(shim.SOURCES / part, folder / part)
    source = folder / mutant.file
    text = source.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.old!r} is {text.count(mutant.old)} times in {mutant.file}"
    source.write_text(text.replace(mutant.old, mutant.new))
    return shim.build("grad_stats", engine, folder, folder, "-O0")


@pytest.fixture(scope="session")
def mutants(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[shim.Shim]]]:
    folders = {name: tmp_path_factory.mktemp("mutant") for name in MUTANTS}
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(_build_mutant, mutant, engine, folders[name]) for name, mutant in MUTANTS.items()}


@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_noticed(mutants: dict[str, Future[shim.Shim]], name: str) -> None:
    library, dtype = mutants[name].result(), MUTANTS[name].dtype

    def shows(case: Case, card: Card) -> bool:
        try:
            worst = error_over_bound(case, dtype, run(library, case, dtype, card))
        except AssertionError:
            return True
        return max(worst.values()) > 1

    assert any(shows(case, card) for case in SHOWING for card in CARDS)


def test_binding_says_what_it_does_not_take() -> None:
    """Needs a build with CUDA, but no device: everything is checked before the first CUDA call."""
    extension = pytest.importorskip("ghostgram._C")
    if extension.cuda_state != "on":
        pytest.skip(f"CUDA is {extension.cuda_state}")
    x = np.ones((2, 3, 4))
    with pytest.raises(ValueError, match="float64 is not supported; use backend='cpu'"):
        extension.cuda.grad_stats_workspace(x, x, None, None, None, None, False)
    x = x.astype(np.float32)
    assert extension.cuda.grad_stats_workspace(x, x, None, None, None, None, False) > 0
    with pytest.raises(ValueError, match="a: expected CUDA memory"):
        extension.cuda.grad_stats(x, x, None, None, None, None, False, x)
