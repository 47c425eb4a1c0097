"""embedding_stats on GPUs: ids are sorted, rows summed by pieces of equal length, and what crosses an edge joined."""

from __future__ import annotations

import math
from typing import Any

from ghostgram.testing import layouts
from ghostgram.testing.cases import embedding_stats as cases
from ghostgram.testing.cases.embedding_stats import CASES, Case
from gpu import DTYPES, Build, Check, Cuda, Kernel, Mutant, Triton

# What the shared cases leave out: rows that cross the edges of pieces of 64 tokens, one piece or many; more directions
# than are taken at once.
EDGES = [
    Case(2, 130, 20, 9, 2), Case(2, 64, 2, 8, 1), Case(2, 65, 2, 8, 1), Case(2, 129, 1, 8, 1, "equal"),
    Case(1, 500, 1, 20, 1, "equal"), Case(2, 150, 9, 3, 1, layout="expanded"), Case(3, 200, 20, 33, 1, padding_idx=3),
    Case(2, 70, 30, 12, 5),
]  # fmt: skip
# More tokens than a block sorts, in two chunks and in three, with ids in both.
CHUNKS = [
    Case(2, 2300, 50, 5, 1), Case(1, 5000, 5000, 3, 1), Case(2, 4500, 9, 3, 1, layout="expanded"),
    Case(2, 100, 30, 12, 35),
]  # fmt: skip


def _nan_where_out_of_range(backend: str) -> Check:
    """Nothing is read for such an id, its sample gets NaN, and the others what they get anyway."""

    def check(make: layouts.Make) -> None:
        for directions, bad in ((1, -1), (2, 40), (0, -(2**63))):
            case = Case(3, 70, 40, 20, directions)
            values = cases.inputs(case, "float32")
            whole = cases.run(case, cases.arrays(case, values, make, "float32"), backend)
            values["ids"][1, 66] = bad
            broken = cases.run(case, cases.arrays(case, values, make, "float32"), backend)
            for name, x in broken.items():
                assert x[1].isnan().all(), f"{name}: {x[1]} with id {bad}"
                assert x[::2].equal(whole[name][::2]), f"{name}: other bits beside a sample with id {bad}"

    return check


def _padding_may_be_nan(backend: str) -> Check:
    """What lies in b where ids are padding is not looked at."""

    def check(make: layouts.Make) -> None:
        case = Case(3, 90, 7, 20, 1, padding_idx=2)
        values = cases.inputs(case, "float32")
        whole = cases.run(case, cases.arrays(case, values, make, "float32"), backend)
        values["b"][values["ids"] == case.padding_idx] = math.nan
        for name, x in cases.run(case, cases.arrays(case, values, make, "float32"), backend).items():
            assert x.equal(whole[name]), f"{name}: other bits with NaN in padding"

    return check


def _checks(backend: str) -> dict[str, Check]:
    return {
        "an id out of range makes its sample NaN": _nan_where_out_of_range(backend),
        "padding may be NaN": _padding_may_be_nan(backend),
    }


CUDA = Cuda(
    cases=[*EDGES, *CHUNKS],
    dtypes=(*DTYPES, "float64"),
    checks=_checks("cuda"),
    mutants={
        "equal ids are rows of their own": Mutant("r < s.tokens && keys[r - 1] == keys[r]", "r < s.tokens && false"),
        "no barrier between steps of the sort": Mutant(
            "        }\n      }\n      __syncthreads();", "        }\n      }"
        ),
        "no barrier before the sort": Mutant("first + i;\n  }\n  __syncthreads();", "first + i;\n  }"),
        "tokens of an id lie in any order": Mutant("high_key == low_key && high_token < low_token", "false"),
        "merged runs collide where ids are equal": Mutant("keys[middle] <= key :", "keys[middle] < key :"),
        "padding adds": Mutant("if (id == s.padding_idx && id >= 0)", "if (false)"),
        "a row that began before is used here": Mutant(
            "begins_here ? use(row, key[k]) : leave(row, 0);", "use(row, key[k]);"
        ),
        "a row that goes on is not left": Mutant("leave(row, begins_here);", "leave(row, 0);"),
        "rows end in the fourth piece": Mutant("more = same[together - 1];", "more = false;"),
        "rows are joined once more": Mutant("(goes_on(first()) && keys[first()] == keys[end])", "false"),
        "joined rows are all there is": Mutant("to[0] = add ? to[0] + squares : squares;", "to[0] = squares;"),
        "every sample has the first one's ids": Mutant("sorted = plan.sorted == 1 ? 0 : sample", "sorted = 0"),
        "shared ids are read per sample": Mutant("sorted = plan.sorted == 1 ? 0 : sample", "sorted = sample"),
        "every direction is the first": Mutant("(first_direction + k) * s.D_direction", "0 * s.D_direction"),
        "a pass has the first one's directions": Mutant("to += (1 + first_direction + lane)", "to += (1 + lane)"),
        "columns beyond the last are read": Mutant(
            "j < left ? widen(from[j]) : 0", "widen(from[j])", "core/columns.cuh"
        ),
        "all rows are taken for aligned": Mutant(
            "allows_16(s.b, s.b_sample, s.b_token, sizeof(In)) &&", "true &&"
        ),
        "a launch on the default stream": Mutant(
            "plan.chunk * pair_bytes, stream,", "plan.chunk * pair_bytes, nullptr,"
        ),
    },
    showing=[
        Case(2, 130, 20, 9, 2), Case(1, 500, 1, 20, 1, "equal"), Case(3, 7, 6, 20, 1, layout="sliced"),
        Case(3, 200, 20, 33, 1, padding_idx=3), Case(2, 150, 9, 3, 1, layout="expanded"), Case(2, 2300, 50, 5, 1),
        Case(2, 100, 30, 12, 35),
    ],
    kernels=[
        Kernel(r"embedding_stats_sort_chunk\(", 1, 256, (24 << 10,)),
        Kernel(r"embedding_stats_merge_runs\(", 1, 256),
        Kernel(r"embedding_stats_sum_pieces<", 6, 256, (0,), ("LDG.E.EF.128", "LDG.E.128")),
        Kernel(r"embedding_stats_join_pieces<", 6, 256, (0,), ("LDG.E.128",)),
        Kernel(r"embedding_stats_sum_shares<", 2, 256),
    ],
)  # fmt: skip


def builds(_backend: str, _arch: int | str) -> list[Build]:
    """Both runs of the kernel with one direction, and as many directions as it takes at once."""
    import triton.language as tl

    from ghostgram.triton_kernels import embedding_stats as kernels

    def build(name: str, dtype: str, itemsize: int, directions: int, join: bool) -> Build:
        cols = kernels.slab_columns(4096, itemsize)
        pointers = dict.fromkeys(("keys", "order"), "*i64") | dict.fromkeys(("D", "edges", "shares"), "*fp32")
        pointers["b"] = f"*{dtype}"
        constants: dict[str, Any] = {
            "PIECE": kernels.PIECE, "COLS": cols, "DIRECTIONS": max(directions, 1), "SUMS": tl.float32, "JOIN": join,
            "UNROLL": kernels.unroll(max(directions, 1)),
        } | ({} if directions else {"D": None})  # fmt: skip
        multiples = ("features", "b_sample", "b_token", "D_direction", "D_row")
        return Build(name, "sum_pieces", pointers, constants, kernels.WARPS, 1, multiples, note=f"{cols}")

    return [
        build("bf16, K = 0", "bf16", 2, 0, False),
        build("bf16, K = 1", "bf16", 2, 1, False),
        build(f"bf16, K = {kernels.MOST_DIRECTIONS}", "bf16", 2, kernels.MOST_DIRECTIONS, False),
        build("bf16, K = 1, joining", "bf16", 2, 1, True),
    ]


TRITON = Triton(
    cases=[
        Case(2, 130, 20, 9, 2), Case(2, 65, 2, 8, 1), Case(2, 70, 9, 3, 1, layout="expanded"), Case(1, 66, 30, 12, 5),
    ],
    work=lambda case: case.samples * case.tokens,  # the interpreter takes as long for a token, whatever its width
    work_limit=300,
    dtypes=(*DTYPES, "float64"),
    checks=_checks("triton"),
    mutants={
        "equal ids are rows of their own": Mutant("inside = (at > 0) & (at < tokens)", "inside = (at > 0) & (at < 0)"),
        "padding adds": Mutant("if padding_idx >= 0:", "if False:"),
        "a row that began before is used here": Mutant("counts & ends & ~inherited", "counts & ends"),
        "a row that goes on is not left": Mutant(
            "mask=leaves & ~inherited & col_live", "mask=leaves & inherited & col_live"
        ),
        "rows end in the second piece": Mutant(
            "mask=end < tokens, other=-1) == last_key", "mask=end < tokens, other=-1) == -2"
        ),
        "rows are joined once more": Mutant("leaves & ~(enters & (tl.load(keys + first) == last_key))", "leaves"),
        "joined rows are all there is": Mutant("squares_sum += tl.load(share)", "squares_sum += 0.0"),
        "every sample has the first one's ids": Mutant("0 if shared else ids.shape[1]", "0"),
        "every direction is the first": Mutant("direction.to(tl.int64)[:, None] * D_direction", "0"),
        "no mask on columns": Mutant("mask=col_live & counts", "mask=counts"),
        "norms of one piece alone": Mutant("shares[:, 0].sum(-1, ", "shares[:, 0, :1].sum(-1, "),
    },
    # "sliced" first: what is read out of bounds there lies in the larger array, whose margins are NaN.
    showing=[
        *(case for case in CASES if case.layout == "sliced"), Case(2, 130, 20, 9, 2),
        Case(1, 200, 1, 20, 1, "equal"), Case(3, 100, 20, 33, 1, padding_idx=3), Case(2, 70, 30, 12, 5),
    ],
    builds=builds,
)  # fmt: skip
