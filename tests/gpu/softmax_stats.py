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
        wrong.flat[list(bad)] = [7, -1, 1 << 30, -100000][: len(bad)] if len(bad) < 5 else -5
        wrong[0, 1] = -100
        made, row = make(logits, "float32", "contiguous"), make(np.array(5.0), "int64", "contiguous")
        out = [make(np.full((2, 30), 9.0), "float32", "contiguous") for _ in range(4)]
        _dispatch.run("softmax_stats", backend, made, make(wrong, "int64", "contiguous"), *out, row, -100)
        named = [i for i in bad if i != 1]
        assert int(row) == (named[0] if named else -1)
        for x in out:
            untouched = _arrays.to_float64(x).ravel() == 9
            assert np.flatnonzero(untouched).tolist() == named


# One off the edges of vectors, tiles and pieces; pieces of a row that rise, fall, hold one logit alone, or nothing.
_CASES = [
    Case(2, 3, 255), Case(1, 2, 511, "rising"), Case(1, 2, 513, "falling"), Case(3, 1, 1024, "sure"), Case(2, 3, 2049, "ties"),
    Case(1, 2, 8191, "sure"), Case(1, 2, 8193, "rising"), Case(1, 2, 8704, "falling"), Case(1, 2, 12300, "masked"), Case(1, 2, 9000, "alone"),
    Case(1, 2, 9001, "equal"), Case(1, 2, 9000, "wide", "soft"), Case(1, 2, 8197, "sure", "one-hot"), Case(2, 1, 8200, "normal", "soft wide", "sliced"),
    Case(7, 9, 33, "alone", "soft"), Case(3, 50, 12, "sure", "soft"), Case(3, 50, 33, "masked"), Case(1, 2, 9000, "wide"), Case(5, 7, 301, layout="sliced"),
]  # fmt: skip
_SHOWING = [
    Case(2, 3, 17), Case(3, 3, 65, "sure"), Case(1, 2, 513, "falling"), Case(1, 2, 4999, "rising"), Case(2, 2, 3001, "wide"), Case(5, 5, 40, "masked"),
    Case(2, 2, 2500, "alone"), Case(1, 2, 8193, "rising"), Case(1, 2, 9000, "alone"), Case(4, 3, 300, "wide"), Case(1, 2, 9001, "equal"),
    Case(4, 3, 33, "sure", "one-hot"), Case(2, 2, 1031, "masked", "soft"), Case(1, 2, 8197, "sure", "one-hot"), Case(3, 5, 10, labels="some ignored"),
]  # fmt: skip

CUDA = Cuda(
    cases=_CASES,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    work=lambda case: float(case.samples * case.tokens * case.classes),
    work_limit=1.1e5,
    checks={"a class number that is none is named": lambda make: _bad_labels(make, "cuda")},
    mutants={
        "a new largest logit goes unnoticed": Mutant("vote(top > std::fmin(first, reference + slack)", "vote(false"),
        "one far above the reference goes unnoticed": Mutant("std::fmin(first, reference + slack)", "first"),
        "lanes differ about the reference": Mutant("    tile.over_lanes(lanes);\n", ""),
        "the largest logit counts among the rest": Mutant("rest.add_one(low, exp_minus(low), -1);", ""),
        "a largest logit that is no more is forgotten": Mutant("rest.add_one(y, exp_minus(y));", ";"),
        "squares are moved to a new reference once": Mutant("k * k * squares", "k * squares"),
        "the spread stays where the old reference was": Mutant("spread + below * sum", "spread"),
        "every piece's first is held out": Mutant("cut != holder && piece.first", "false && piece.first"),
        "the first piece of a long row is lost": Mutant(
            "rest.add(piece.rest.scaled(", "if (cut) rest.add(piece.rest.scaled("
        ),
        "classes beyond whole vectors are dropped": Mutant("at + e < end ? row[at + e] : fill", "fill"),
        "the end of a row is not looked at": Mutant("at + e < end ? row[at + e] : fill", "row[at + e]"),
        "vectors read where they are misaligned": Mutant("misaligned == 0 &&", "misaligned % 4 == 0 &&"),
        "el2n leaves the label among the others": Mutant("except = 1 + (others - w)", "except = 1 + others"),
        "a distribution's first class is near 1 by subtraction": Mutant("(1 - qc) - missing", "(1 - missing) - qc"),
        "classes that cannot be make the loss NaN": Mutant("qc != 0 ? qc * (first - zc) : Acc(0)", "qc * (first - zc)"),
        "ignored rows are not written": Mutant("write(0, 0, 0, 0);", ";"),
        "a launch on the default stream": Mutant("threads, 0, stream, s, plan, stretches);", "threads, 0, nullptr, s, plan, stretches);"),
    },
    showing=_SHOWING,
    kernels=[
        Kernel(r"softmax_stats_stretch<", 4, 128, (0,), ("LDG.E.128",)),
        Kernel(r"softmax_stats_residual<", 6, 128, (0,), ("LDG.E.128",)),
        Kernel(r"softmax_stats_finish<", 4, 128),
    ],
)  # fmt: skip
