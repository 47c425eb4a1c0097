"""gumbel_topk on GPUs: keys of the bits that the CPU's have, a select and a sort; no case may need the host."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

import ghostgram as gg
from ghostgram import _arrays, _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.cases import gumbel_topk as cases
from ghostgram.testing.cases.gumbel_topk import DTYPES, Case
from gpu import Build, Cuda, Kernel, Mutant, Triton


def _raises(error: type[Exception], message: str, call: Callable[..., Any], *args: Any, **options: Any) -> None:
    try:
        call(*args, **options)
    except error as found:
        said = str(found)
    else:
        said = "nothing"
    assert message in said, f"expected {message!r}, got {said!r}"


def _pool(make: layouts.Make, scores: Any, ids: Any) -> tuple[Any, Any]:
    scores, ids = np.asarray(scores, float), np.asarray(ids, np.int64)
    return make(scores, "float32", "contiguous"), make(ids, "int64", "contiguous")


def _known_bits(backend: str, make: layouts.Make) -> None:
    top = gg.GumbelTopK(50, seed=2024, backend=backend)
    ids = np.arange(2_000)
    for half in (ids[:1_500], ids[1_000:]):  # some of them twice
        top.update(make(half / 500, "float64", "contiguous"), make(half, "int64", "contiguous"))
    found = b"".join(_arrays.to_numpy(x).tobytes() for x in top.result())
    assert hashlib.sha256(found).hexdigest()[:16] == cases.KNOWN_BITS


def _faults(backend: str, make: layouts.Make) -> None:
    scores = np.zeros(9_000)
    scores[[7_001, 8_000]] = np.nan
    some, own = _pool(make, scores, np.arange(9_000))
    for k in (0, 10):
        _raises(ValueError, "got NaN at index 7001", gg.gumbel_topk, some, k, backend=backend)
        top = gg.GumbelTopK(k, backend=backend)
        _raises(ValueError, "got NaN at index 7001", top.update, some, own)
        assert len(top.result()[0]) == k, "a NaN was taken in, or kept others out"

    scores, ids = np.zeros(5_000), np.arange(5_000)
    best = [20, 21, 3_000, 4_000]
    scores[best], ids[best] = 40.0, [7, 7, 3_000, 3_000]
    some, own = _pool(make, scores, ids)
    assert len(gg.gumbel_topk(some, 10, ids=own, backend=backend)) == 10  # equal scores: one document
    scores[[21, 4_000]] = 41.0
    some, own = _pool(make, scores, ids)
    _raises(ValueError, "got two for id 7", gg.gumbel_topk, some, 10, ids=own, backend=backend)
    ids[[20, 21]] = -7  # the larger one, as unsigned
    some, own = _pool(make, scores, ids)
    _raises(ValueError, "got two for id 3000", gg.gumbel_topk, some, 10, ids=own, backend=backend)
    some, own = _pool(make, np.zeros(3), np.zeros(3))
    _raises(ValueError, "at least 3 different", gg.gumbel_topk, some, 3, ids=own, backend=backend)


def _infinities(backend: str, make: layouts.Make) -> None:
    scores = np.array([-np.inf, 0.0, np.inf, 1.0, np.inf, -np.inf, -0.0] + [0.5] * 1_000)
    some, _ = _pool(make, scores, np.arange(1_007))
    for temperature in (0.0, 1.0):
        order = gg.gumbel_topk(some, 2_000, temperature=temperature, backend=backend)
        assert order.shape == (1_007,)
        assert order[:2].tolist() == [2, 4]
        assert order[-2:].tolist() == [0, 5]
    order = gg.gumbel_topk(some, 2_000, temperature=0.0, backend=backend)
    assert order[-4:].tolist() == [1, 6, 0, 5]


def _streams(backend: str, make: layouts.Make) -> None:
    """In any order and sharding, merged, pickled and resumed: the same bits."""
    rng = np.random.default_rng(0)
    scores, ids = rng.standard_normal(6_000).round(2), rng.permutation(12_000)[:6_000]

    def fed(parts: Sequence[Any], **options: Any) -> gg.GumbelTopK:
        top = gg.GumbelTopK(301, backend=backend, **options)
        for part in parts:
            top.update(*_pool(make, scores[part], ids[part]))
        return top

    for temperature in (1.0, 0.0):
        expected = fed([slice(None)], temperature=temperature).result()
        shards = [fed([slice(i, None, 6), slice(i + 3, None, 6)], temperature=temperature) for i in range(3)]
        for other in shards[1:]:
            shards[0].merge(other)
        resumed = gg.GumbelTopK.__new__(gg.GumbelTopK)
        resumed.__dict__.update(shards[0].__getstate__())
        resumed.update(*_pool(make, scores[5:500], ids[5:500]))
        for top in (shards[0], resumed):
            for got, wanted in zip(top.result(), expected, strict=True):
                assert _arrays.to_numpy(got).tobytes() == _arrays.to_numpy(wanted).tobytes()


def _no_room(backend: str, make: layouts.Make) -> None:
    """Of a reservoir that breaks the rules nothing is touched, and the fault says so."""
    scores, ids = _pool(make, np.arange(900.0), np.arange(900))
    for k, room, held, by_position in (
        (400, 911, 12, False), (1, 100, -1, False), (1, 100, 101, False), (1, 900, 1, True),
    ):  # fmt: skip
        state = cases.reservoir(scores, room)
        state[2][...] = held
        before = [_arrays.to_numpy(x).copy() for x in state[:4]]
        _dispatch.run("gumbel_topk", backend, scores, ids, *state, k, 1, 1.0, by_position, True)
        assert [_arrays.to_numpy(x).tobytes() for x in state[:4]] == [x.tobytes() for x in before]
        assert state[4].tolist() == [-1, 0, -1, 1]
    state = cases.reservoir(scores, 912)
    state[2][...] = 12
    state[0][:12], state[1][:12] = 1e9, -1
    _dispatch.run("gumbel_topk", backend, scores, ids, *state, 400, 1, 1.0, False, True)
    assert state[4].tolist() == [-1, 0, -1, 0]
    assert state[2].tolist() == [400]


def _checks(backend: str) -> dict[str, Callable[[layouts.Make], None]]:
    return {
        "the bits of a known draw": partial(_known_bits, backend),
        "faults are reported": partial(_faults, backend),
        "infinities are first and last": partial(_infinities, backend),
        "streams, shards and resumed ones agree": partial(_streams, backend),
        "no room is refused": partial(_no_room, backend),
    }


# Edges of tiles; equal keys and positions for ids, which the select alone tells apart; reservoirs that fill slowly.
_EXTRA = [
    Case(2047, 2046), Case(2049, 2048, 0.0), Case(5003, 211, 0.0, "equal"), Case(6007, 6007, ids="random"),
    Case(5003, 301, ids="random", spare=4000, batches=7),
    Case(9001, 5000, 0.0, "equal", ids="high", spare=600, batches=3),
]  # fmt: skip
_SHOWING = [
    Case(6007, 701, 1.0, ids="repeated"), Case(9001, 501, 2.0, ids="random", batches=5),
    Case(5003, 211, 0.0, "equal"), Case(5003, 301, ids="random", spare=4000, batches=7),
    Case(9001, 5000, 0.0, "equal", ids="high", spare=600, batches=3),
    Case(6007, 301, 0.0, "equal", ids="repeated", batches=3), Case(4001, 301, 1.0, "wide", ids="high"),
]  # fmt: skip


def _count(case: Case) -> float:
    return float(case.count)


CUDA = Cuda(
    cases=_EXTRA,
    dtypes=DTYPES,
    work=_count,
    work_limit=1e4,
    checks=_checks("cuda"),
    variants={
        "small pieces": Mutant("int64_t{1} << 24", "int64_t{1} << 11"),
        "small samples, half of their guesses too high": Mutant(
            "sample_blocks = 64, sample_of_a_block = 256, sample_margin = 5",
            "sample_blocks = 4, sample_of_a_block = 16, sample_margin = 0",
        ),
        "few blocks": Mutant("most_blocks = 1024", "most_blocks = 2"),
    },
    mutants={
        "noise by position": Mutant("return s.ids ? s.ids[at] : uint64_t(at);", "return uint64_t(at);"),
        "a bound that is none": Mutant("- bound_offset : threshold", "+ 3 - bound_offset : threshold", "core/gumbel.h"),
        "ties by larger id": Mutant("x_id < y_id : x.pick", "x_id > y_id : x.pick"),
        "no barrier before a list is read": Mutant("__syncthreads(); // the list", "// the list"),
        "no barrier before counts are read": Mutant(
            "__syncthreads(); // everyone has counted", "// everyone has counted"
        ),
        "no barrier between steps of the network": Mutant(
            "__syncthreads(); // the step", "// the step", "core/sort.cuh"
        ),
        "no barrier before warps' sums are read": Mutant(
            "__syncthreads(); // everyone's", "// everyone's", "core/sort.cuh"
        ),
        "a bin too far": Mutant("left <= int64_t(count[j])", "left < int64_t(count[j])"),
        "ids not selected": Mutant("if (by_id && entry.order != order)", "if (by_id)"),
        "repeats kept": Mutant("!before.same(from[i - 1], entry)", "true"),
        "repeats take the places of others": Mutant("if (w.guessed || may_repeat)", "if (w.guessed)"),
        "a threshold too high": Mutant("begin + i == s.k - 1", "begin + i == s.k / 2"),
        "the reservoir left out": Mutant("most(0, least(tile, held - t * tile))", "0"),
        "a launch on the default stream": Mutant(
            "block_threads, shared, stream, s", "block_threads, shared, nullptr, s"
        ),
    },
    showing=_SHOWING,
    kernels=[
        Kernel(r"gumbel_topk_begin\(", 1, 32),
        Kernel(r"gumbel_topk_sample<", 4, 256, (0,), ("DADD", "DMUL", "DFMA")),
        Kernel(r"gumbel_topk_pass<", 4, 256, (4128,), ("DADD", "DMUL", "IMAD.WIDE.U32")),
        Kernel(r"gumbel_topk_filter<", 2, 256, (32,)),
        Kernel(r"gumbel_topk_number<", 3, 1024, (128,)),
        Kernel(r"gumbel_topk_place<", 3, 256),
        Kernel(r"gumbel_topk_select\(", 1, 256, (8228,), ("ATOMS",)),
        Kernel(r"gumbel_topk_sort\(", 1, 256, (32 << 10,), ("LDS.128", "STS.128")),
        Kernel(r"gumbel_topk_merge\(", 1, 256, ((32 << 10) + 16,), ("LDS.128", "STG.E.128")),
        Kernel(r"gumbel_topk_two_scores\(", 1, 256),
    ],
)


def builds(_backend: str, _arch: int | str) -> list[Build]:
    """With ids and without, with noise and without, of each dtype one."""
    from ghostgram.triton_kernels import gumbel_topk as kernels

    pointers = {"ids": "*i64", "threshold": "*fp64", "orders": "*i64", "nan_at": "*i64"}
    scalars = {"count": "i64", "seed": "i64", "temperature_bits": "i64"}
    return [
        Build(
            f"{dtype}, {'ids' if ids else 'positions'}{'' if noisy else ', no noise'}", "gumbel_topk_orders",
            {"scores": f"*{dtype}"} | pointers | scalars,
            {"NOISY": noisy, "DOCUMENTS": kernels.DOCUMENTS} | ({} if ids else {"ids": None}),
            warps=kernels.WARPS, options=kernels.FLAGS, note=f"{kernels.DOCUMENTS} documents",
        )
        for dtype, ids, noisy in (
            ("bf16", True, True), ("fp32", False, True), ("fp64", True, True), ("fp32", True, False),
        )
    ]  # fmt: skip


TRITON = Triton(
    cases=_EXTRA,
    dtypes=DTYPES,
    work=_count,
    work_limit=2.1e4,
    checks=_checks("triton"),
    mutants={
        "noise by position": Mutant("at if ids is None else", "at if True else"),
        "keys of another word": Mutant("^ c3 ^ key1, p", "^ c3 ^ key0, p"),
        "logarithm with one term less": Mutant("w * (w * R6 + R4)", "w * R4"),
        "the threshold itself left out": Mutant("key >= tl.load(threshold)", "key > tl.load(threshold)"),
        "repeats kept": Mutant("counts[1:] &= ", "counts[1:] | "),
        "ids compared as signed": Mutant("torch.sort(own_ids ^ SIGN, stable", "torch.sort(own_ids, stable"),
        "poison taken in": Mutant("torch.arange(capacity, device=scores.device) < held", "keys.isnan() | True"),
        "one too few": Mutant("clamp(max=k)", "clamp(max=k - 1)"),
        "a threshold too high": Mutant("best_keys[k - 1]", "best_keys[k // 2]"),
    },
    showing=_SHOWING,
    builds=builds,
)  # fmt: skip
