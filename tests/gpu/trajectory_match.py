"""trajectory_match on GPUs: a block or program sums a chunk of one tensor; a table of tensors in the parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

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
    Case((3, 0) * 29 + (5, 2500) + (7,) * 60, mask="real"), Case((2047, 2049, 4097), "loss"),
    Case((3, 0) * 30 + (5, 2500) + (7,) * 60, "gradient", first=2600),
    Case((2049, 4097), "gradient", "bool", layout="sliced"),
]  # fmt: skip
_SHOWING = [
    Case((40, 0, 71, 9), "both", "real"), Case((33, 5000, 64), mask="weights"), Case((40, 70, 9), "gradient", first=57),
    Case((40, 0, 71, 9), "gradient", "bool"), Case((500, 37), "gradient", unit=1e25), *_CASES,
    Case((17, 129, 1030), layout="sliced"), Case((3000, 7), "loss"), Case((1,), "derivative"),
]  # fmt: skip


def _scalars(case: Case) -> float:
    return float(sum(case.sizes))


CUDA = Cuda(
    cases=_CASES,
    dtypes=DTYPES,
    work=_scalars,
    work_limit=2.5e5,
    checks={"nothing is written where totals are unusable": lambda make: _unusable(make, "cuda")},
    mutants={
        "no barrier before warps' sums are added": Mutant("  __syncthreads();\n", ""),
        "vectors read where they are misaligned": Mutant("aligned = places % 16 == 0", "aligned = places % 2 == 0"),
        "the end of a tensor not masked": Mutant("least(Step::n, end - i)), sums", "Step::n), sums"),
        "the front dropped by whole vectors": Mutant("bool keep = e >= dropped", "bool keep = true"),
        "dropped gradients not written": Mutant("      step.drop(", "      if (false) step.drop("),
        "launches after the first overwrite its sums": Mutant("at.partials += at.first_block[at.count];", ""),
        "weights of tensors left out of sums": Mutant("x.weight * all.num", "all.num"),
        "the scale in one factor": Mutant("Acc(power_of_two(half))", "Acc(power_of_two(half) * power_of_two(half))"),
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


def builds(backend: str, arch: int | str) -> list[Build]:
    """Every sweep, every dtype and every kind of mask, in a few builds."""
    from ghostgram.triton_kernels import trajectory_match as kernels

    made = []
    loss, start, both, alone = (True, True, False), (True, False, False), (False, True, True), (False, False, True)
    for dtype, what, mask, aligned in [
        ("bf16", loss, "real", True), ("bf16", both, "bool", True), ("fp16", alone, "none", False),
        ("fp32", loss, "none", True), ("fp64", start, "real", True),
    ]:  # fmt: skip
        acc = "fp64" if dtype == "fp64" else "fp32"
        out = acc if what[1] else dtype
        names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
        types = {name: kernels.TYPES[getattr(torch, full)] for name, full in names.items()}
        table = dict.fromkeys(("students", "starts", "targets", "masks", "gradients", "weights"), "i64")
        table |= dict.fromkeys(("sizes", "dropped", "first_block"), "i32")
        pointers = {"partials": "*fp64", "totals": "*fp64", "loss_gradient": f"*{acc}"}
        constants = dict(zip(("START", "STUDENT", "GRADIENT"), what, strict=True)) | {
            "TARGET": True, "MASK": mask, "IN": types[dtype], "OUT": types[out], "ACC": types[acc],
            "BLOCK": kernels.BLOCK, "ALIGNED": aligned, "ROUND": False,
        }  # fmt: skip
        title = {loss: "loss", start: "D", both: "num and gradient", alone: "gradient"}[what]
        made.append(
            Build(
                f"{dtype}, {title}, mask {mask}{'' if aligned else ', unaligned'}", "sweep",
                {name: (kind,) * kernels.TENSORS for name, kind in table.items()} | pointers, constants,
                kernels.WARPS, multiples=("chunk",), note=f"{kernels.BLOCK} of each of {kernels.TENSORS}",
            )
        )  # fmt: skip
    pointers = {"partials": "*fp64", "totals": "*fp64", "loss": "*fp32"}
    constants = {"START": True, "STUDENT": True, "BLOCK": kernels.BLOCK}
    return [*made, Build("sum over programs", "finish", pointers, constants, kernels.WARPS)]


TRITON = Triton(
    cases=_CASES,
    dtypes=DTYPES,
    work=_scalars,
    work_limit=4e4,
    checks={"nothing is written where totals are unusable": lambda make: _unusable(make, "triton")},
    mutants={
        "the end of a tensor not masked": Mutant("at < end\n", "at < end + 1\n"),
        "the front dropped by whole blocks": Mutant("kept = at >= dropped", "kept = at >= i"),
        "dropped gradients not written": Mutant("range(0, read, BLOCK)", "range(0, 0, BLOCK)"),
        "a program takes the tensor before its own": Mutant(
            "own = program >= first_block[t]", "own = program > first_block[t]"
        ),
        "launches after the first overwrite its sums": Mutant("done += table.programs", "pass"),
        "blocks after the first left out": Mutant(
            "range(read, whole, BLOCK)", "range(read, tl.minimum(whole, read + BLOCK), BLOCK)"
        ),
        "the last part of a chunk left out": Mutant("if whole < end:", "if whole > end:"),
        "weights of tensors left out of gradients": Mutant("bitcast=True) * weight).to(ACC)", "bitcast=True)).to(ACC)"),
        "a mask left out of gradients": Mutant("tl.where(kept, g * m, 0.0)", "tl.where(kept, g, 0.0)"),
        "the scale in one factor": Mutant("power = tl.cast((1023 + half)", "power = tl.cast((1023 + 2 * half)"),
        "num not added after the gradient": Mutant("tl.store(totals, num)", "pass"),
    },
    # Of the "sliced" ones, whose margins are NaN, first.
    showing=[Case((17, 129, 1030), mask="bool", layout="sliced"), Case((2100, 2049), first=2060), *_SHOWING],
    builds=builds,
)
