"""trajectory_match on GPUs: a block or program sums a chunk of one tensor; a table of tensors in the parameters."""

from __future__ import annotations

from typing import Any

import numpy as np

from ghostgram import _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.cases.trajectory_match import Case
from gpu import Build, Cuda, Kernel, Mutant, Triton

DTYPES = ("float32", "bfloat16", "float16", "float64")


def _unusable(make: layouts.Make, backend: str) -> None:
    """No gradient is written where start is target or a weight is negative, whoever has found that out."""
    x = np.arange(1.0, 6.0)
    for start, weight in ((x, 1.0), (x + 1, -1.0)):
        lists = [[make(v, "float32", "contiguous")] for v in (x - 1, start, x, np.full(5, weight))]
        for alone in (False, True):
            known = [0.0, 0.0 if weight > 0 else 5.0, 55.0, 0.0 if weight > 0 else 5.0]
            totals = make(np.array(known if alone else [np.nan] * 4), "float64", "contiguous")
            loss = None if alone else make(np.full((), np.nan), "float32", "contiguous")
            gradient = [make(np.full(5, np.nan), "float32", "contiguous")]
            inputs: list[Any] = [lists[0], None if alone else lists[1], lists[2], lists[3]]
            g = make(np.array(0.5), "float32", "contiguous") if alone else None
            _dispatch.run("trajectory_match", backend, *inputs, g, loss, totals, gradient, None, 0)
            assert gradient[0].isnan().all(), "a gradient without a usable D"
            assert totals[3] == known[3]
            assert weight < 0 or totals[1] == 0


# More tensors than a launch's table holds, empty ones among them; chunks that end inside a vector, and longer ones.
_CASES = [
    Case((3, 0) * 29 + (5, 2500) + (7,) * 60, mask="real"), Case((3, 0) * 30 + (5, 2500) + (7,) * 60, "gradient", first=2600),
    Case((2047, 2049, 4097), "loss"), Case((2049, 4097), "gradient", "bool", layout="sliced"),
]  # fmt: skip
_SHOWING = [
    Case((40, 0, 71, 9), "both", "real"), Case((33, 5000, 64), mask="weights"), Case((40, 70, 9), "gradient", first=57),
    Case((40, 0, 71, 9), "gradient", "bool"), Case((500, 37), "gradient", unit=1e25), *_CASES,
    Case((17, 129, 1030), layout="sliced"), Case((3000, 7), "loss"), Case((1,), "derivative"),
]  # fmt: skip

CUDA = Cuda(
    cases=_CASES,
    dtypes=DTYPES,
    work=lambda case: float(sum(case.sizes)),
    work_limit=2.5e5,
    checks={"nothing is written where totals are unusable": lambda make: _unusable(make, "cuda")},
    mutants={
        "no barrier before warps' sums are added": Mutant("  __syncthreads();\n", ""),
        "one warp not added": Mutant("warp < warps;", "warp + 1 < warps;"),
        "vectors read where they are misaligned": Mutant("aligned = places % 16 == 0", "aligned = places % 2 == 0"),
        "the end of a tensor not masked": Mutant("least(Step::n, end - i)), sums", "Step::n), sums"),
        "the front dropped by whole vectors": Mutant("bool keep = e >= dropped", "bool keep = true"),
        "dropped gradients not written": Mutant("      step.drop(", "      if (false) step.drop("),
        "a block takes the tensor after its own": Mutant("first_block[middle] <= block", "first_block[middle] <= block + 1"),
        "launches after the first overwrite its sums": Mutant("at.partials += at.first_block[at.count];", ""),
        "weights of tensors left out of sums": Mutant("x.weight * all.num", "all.num"),
        "weights of tensors left out of gradients": Mutant("scale.rest * x.weight", "scale.rest"),
        "the scale in one factor": Mutant("Acc(power_of_two(half))", "Acc(power_of_two(half) * power_of_two(half))"),
        "num not added after the gradient": Mutant("totals->num = sums.num;", ""),
        "a launch on the default stream": Mutant("shared_bytes, stream, partials", "shared_bytes, nullptr, partials"),
    },
    showing=_SHOWING,
    kernels=[
        Kernel(r"trajectory_match_sweep<float, \d, ", 8, 256, (256,), ("LDG.E.128",)),
        Kernel(r"trajectory_match_sweep<double, \d, ", 8, 256, (256,), ("LDG.E.128",)),
        Kernel(r"trajectory_match_sweep<gg::bf16, \d, ", 8, 256, (256,), ("LDG.E.128",)),
        Kernel(r"trajectory_match_sweep<gg::f16, \d, ", 8, 256, (256,), ("LDG.E.128",)),
        Kernel(r"trajectory_match_finish<", 2, 256, (256,)),
    ],
)
