"""softmax_stats on GPUs: tiles of a row summed against a reference that moves when it must; pieces put together."""

from __future__ import annotations

import numpy as np

from ghostgram import _arrays, _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.cases.softmax_stats import Case
from gpu import Build, Cuda, Kernel, Mutant, Triton


def _bad_labels(make: layouts.Make, backend: str) -> None:
    """The first row whose class number is none is named, and its results and no others are left as they were."""
    logits = np.arange(2 * 30 * 7.0).reshape(2, 30, 7) % 5
    labels = np.arange(60.0).reshape(2, 30) % 7
    for bad in ([], [59], [3, 7, 31, 59], range(60)):
        wrong = labels.copy()
        for i, value in zip(bad, [7, -1, 1 << 30, -100000] * 15, strict=False):
            wrong.flat[i] = value
        wrong[0, 1] = -100
        made, row = make(logits, "float32", "contiguous"), make(np.array(5.0), "int64", "contiguous")
        out = [make(np.full((2, 30), 9.0), "float32", "contiguous") for _ in range(4)]
        _dispatch.run("softmax_stats", backend, made, make(wrong, "int64", "contiguous"), *out, row, -100)
        named = [i for i in bad if i != 1]
        assert int(row) == (named[0] if named else -1)
        for x in out:
            untouched = _arrays.to_float64(x).ravel() == 9
            assert np.flatnonzero(untouched).tolist() == named


def _late(make: layouts.Make, backend: str) -> None:
    """A tile with one class that can be, or none, before tiles with many."""
    rng = np.random.default_rng(0)
    logits = np.full((3, 1, 9000), -np.inf)
    logits[:, :, 6000:] = 3 * rng.standard_normal(3000)
    logits[0, 0, 5], logits[1, 0, 5] = 1.0, 40.0
    logits = layouts.rounded(logits, "float32")
    results = []
    for name in ("reference", backend):
        made = layouts.numpy_array if name == "reference" else make
        out = [made(np.full((3, 1), np.nan), "float32", "contiguous") for _ in range(4)]
        row = made(np.array(0.0), "int64", "contiguous")
        labels = made(np.full((3, 1), 6000.0), "int64", "contiguous")
        _dispatch.run("softmax_stats", name, made(logits, "float32", "contiguous"), labels, *out, row, -100)
        results.append(np.array([_arrays.to_float64(x) for x in out]))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)


# One off the edges of vectors, tiles and pieces; pieces of a row that rise, fall, hold one logit alone, or nothing.
_CASES = [
    Case(2, 3, 255), Case(1, 2, 511, "rising"), Case(1, 2, 513, "falling"), Case(3, 1, 1024, "sure"),
    Case(2, 3, 2049, "ties"), Case(1, 2, 8191, "sure"), Case(1, 2, 8193, "rising"), Case(1, 2, 8704, "falling"),
    Case(1, 2, 12300, "masked"), Case(1, 2, 9000, "alone"), Case(1, 2, 9001, "equal"), Case(1, 2, 9000, "wide"),
    Case(1, 2, 9000, "wide", "soft"), Case(1, 2, 8197, "sure", "one-hot"), Case(7, 9, 33, "alone", "soft"),
    Case(2, 1, 8200, "normal", "soft wide", "sliced"), Case(3, 50, 12, "sure", "soft"), Case(3, 50, 33, "masked"),
    Case(4, 8, 600, "wide"), Case(2, 8, 2500, "wide"), Case(5, 7, 301, layout="sliced"),
]  # fmt: skip
_SHOWING = [
    Case(2, 3, 17), Case(4, 8, 600, "wide"), Case(3, 3, 65, "sure"), Case(1, 2, 513, "falling"),
    Case(1, 2, 4999, "rising"), Case(2, 2, 3001, "wide"), Case(5, 5, 40, "masked"), Case(2, 2, 2500, "alone"),
    Case(1, 2, 8193, "rising"), Case(1, 2, 9000, "alone"), Case(1, 2, 9001, "equal"), Case(4, 3, 33, "sure", "one-hot"),
    Case(2, 2, 1031, "masked", "soft"), Case(1, 2, 8197, "sure", "one-hot"), Case(3, 5, 10, labels="some ignored"),
]  # fmt: skip
# What a Triton program's longer pieces take to be several, and tied largest logits.
_LONGER = [
    Case(1, 1, 16400, "equal"), Case(1, 1, 20001, "sure", "one-hot"), Case(1, 1, 16385, "falling"),
    Case(2, 2, 101, "ties"),
]  # fmt: skip


def _logits(case: Case) -> float:
    return float(case.samples * case.tokens * case.classes)


CUDA = Cuda(
    cases=_CASES,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    work=_logits,
    work_limit=1.1e5,
    checks={
        "a class number that is none is named": lambda make: _bad_labels(make, "cuda"),
        "classes that can be come late": lambda make: _late(make, "cuda"),
    },
    mutants={
        "a new largest logit goes unnoticed": Mutant("vote(top > std::fmin(first, reference + slack)", "vote(false"),
        "one far above the reference goes unnoticed": Mutant("std::fmin(first, reference + slack)", "first"),
        "the largest logit counts among the rest": Mutant("rest.add_one(low, exp_minus(low), -1);", ""),
        "squares are moved to a new reference once": Mutant("k * k * squares", "k * squares"),
        "the first piece of a long row is lost": Mutant(
            "rest.add(piece.rest.scaled(", "if (cut) rest.add(piece.rest.scaled("
        ),
        "the end of a row is not looked at": Mutant("at + e < end ? row[at + e] : fill", "row[at + e]"),
        "vectors read where they are misaligned": Mutant("misaligned == 0 &&", "misaligned % 4 == 0 &&"),
        "a distribution's first class is near 1 by subtraction": Mutant("(1 - qc) - missing", "(1 - missing) - qc"),
        "ignored rows are not written": Mutant("write(0, 0, 0, 0);", ";"),
        "a launch on the default stream": Mutant(
            "threads, 0, stream, s, plan, stretches);", "threads, 0, nullptr, s, plan, stretches);"
        ),
    },
    showing=_SHOWING,
    kernels=[
        Kernel(r"softmax_stats_stretch<", 4, 128, (0,), ("LDG.E.128",)),
        Kernel(r"softmax_stats_residual<", 6, 128, (0,), ("LDG.E.128",)),
        Kernel(r"softmax_stats_finish<", 4, 128),
    ],
)


def builds(backend: str, arch: int | str) -> list[Build]:
    """Long rows and short ones, whole and cut, with class numbers and distributions."""
    from ghostgram.triton_kernels import softmax_stats as kernels

    strides = ("logit_sample", "logit_token", "label_sample", "label_token")
    made = []

    def build(rows: int, classes: int, dtype: str, soft: bool, names: tuple[str, ...]) -> None:
        shape = kernels.plan(rows, classes)
        cuts = 1 << (shape.cuts - 1).bit_length()
        pointers = {"logits": f"*{dtype}", "labels": "*fp32" if soft else "*i64"}
        pointers |= dict.fromkeys(("stretches", "residuals"), "*fp64")
        pointers |= dict.fromkeys(("loss", "el2n", "entropy", "max_probability"), "*fp32") | {"bad_row": "*u64"}
        multiples = ("classes", "classes_per_cut", *strides) if classes % 16 == 0 else ()
        tile = {"ROWS": shape.rows_per_program, "COLS": shape.cols}
        end = {"ROWS": max(1, kernels.FINISH // cuts), "CUTS": cuts, "DISTRIBUTIONS": soft}
        constants = {
            "stretch": tile | {"DISTRIBUTIONS": soft}, "residual": tile | {"CUTS": cuts}, "finish": end,
        }  # fmt: skip
        for name in names:
            note = f"{end['ROWS']} x {cuts}" if name == "finish" else f"{tile['ROWS']} x {tile['COLS']}"
            title = f"{name}, {dtype}, ({rows}, {classes}){', distributions' if soft else ''}"
            made.append(Build(title, name, pointers, constants[name], kernels.WARPS, multiples=multiples, note=note))

    build(4096, 50257, "fp32", False, ("stretch", "finish"))
    build(4096, 50304, "bf16", False, ("stretch",))
    build(50000, 10, "fp16", False, ("stretch",))
    build(8, 262144, "bf16", True, ("residual", "finish"))
    return made


TRITON = Triton(
    cases=_CASES + _LONGER,
    work=_logits,
    work_limit=3e4,
    checks={
        "a class number that is none is named": lambda make: _bad_labels(make, "triton"),
        "classes that can be come late": lambda make: _late(make, "triton"),
    },
    mutants={
        "a new largest logit goes unnoticed": Mutant("(tile_first > tl.minimum(first, reference + SLACK)) |", ""),
        "the largest logit counts among the rest": Mutant("own_sum += plus - minus", "own_sum += plus"),
        "a largest logit that is no more is forgotten": Mutant("own_sum += plus - minus", "own_sum -= minus"),
        "the second is not the first where they are tied": Mutant(
            "> 1, tile_first, tile_second)", "> 9, tile_first, tile_second)"
        ),
        "squares are moved to a new reference once": Mutant("(k * k)[:, None]", "k[:, None]"),
        "the spread stays where the old reference was": Mutant("(spreads + below[:, None] * sums)", "spreads"),
        "every piece's first is held out": Mutant("w = tl.where(joins, tl.exp(-distance), 0.0)", "w = distance * 0.0"),
        "whole tiles after the first left out": Mutant(
            "range(begin, whole, COLS)", "range(begin, tl.minimum(whole, begin + COLS), COLS)"
        ),
        "the last tile left out": Mutant("if whole < end:", "if whole > end:"),
        "el2n leaves the label among the others": Mutant("1 + (others - w)", "1 + others"),
        "a distribution's first class is near 1 by subtraction": Mutant(
            "(1 - q) - missing[:, None]", "(1 - missing[:, None]) - q"
        ),
        "classes that cannot be make the loss NaN": Mutant(
            "tl.where(q != 0, q * (first[:, None] - z), 0.0)", "q * (first[:, None] - z)"
        ),
        "log1p by log": Mutant("tl.log(one_more) * (others / (one_more - 1))", "tl.log(one_more)"),
        "ignored rows are not written": Mutant("live &= named | ignored", "live &= named"),
    },
    showing=_SHOWING + _LONGER,
    builds=builds,
)
