"""libghostgram: its header, its symbols, what it refuses, and that its doors lead to the kernels that Python calls."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import c_abi
from ghostgram import _arrays, _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.compare import cases_of
from simt.card import Card, Settings

ROOT = Path(__file__).parents[2]
INVALID = c_abi.CONSTANTS["INVALID"]


@pytest.fixture(scope="module")
def lib():
    return c_abi.load(c_abi.library())


def test_every_op_has_a_door():
    assert list(_dispatch.OPS) == c_abi.OPS


def test_versions_agree(lib):
    version = ".".join(str(c_abi.CONSTANTS[f"VERSION_{part}"]) for part in ("MAJOR", "MINOR", "PATCH"))
    assert lib.ghostgram_version().decode() == version
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("standard", ["c99", "c17", "c++98", "c++20"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_header_is_plain(compiler, standard, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    suffix, long_long = ("cpp", ["-Wno-long-long"]) if standard.startswith("c++") else ("c", [])
    source = tmp_path / f"use.{suffix}"
    source.write_text("#include <ghostgram/ghostgram.h>\nint main(void) { return GHOSTGRAM_OK; }\n")
    strict = ["-pedantic", "-Wall", "-Wextra", "-Werror", *long_long]
    command = [compiler, f"-std={standard}", *strict, f"-I{c_abi.HEADER.parents[1]}", "-fsyntax-only", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_what_is_meant_to_be_seen_is():
    """Functions of the header under the public node, kernels and threads for our own modules under the private one."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    command = ["nm", "-D", "--defined-only", "--with-symbol-versions", "--demangle", c_abi.library()]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    nodes = {"GHOSTGRAM_0.1": set(), "GHOSTGRAM_PRIVATE": set()}
    for name in (line.split(maxsplit=2)[2] for line in lines):
        symbol, _, node = name.partition("@@")
        if symbol not in nodes:  # the nodes are symbols too
            nodes[node].add(symbol)
    assert nodes["GHOSTGRAM_0.1"] == set(re.findall(r"\b(ghostgram_\w+)\(", c_abi.TEXT))
    private = nodes["GHOSTGRAM_PRIVATE"]
    assert {f"gg::{op}_cpu" for op in _dispatch.OPS} <= {name.partition("(")[0] for name in private}
    assert [name for name in private if not re.fullmatch(r"gg::\w+\(.*\)", name)] == []


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_an_op_gives_the_same_bits_as_in_python(op, lib, monkeypatch):
    """All its cases below a megabyte: layouts, dtypes, edges."""
    python, c = _dispatch._runner, c_abi.runner(lib, op)
    cases = cases_of(op)
    small = [case for case in cases.CASES if case.bytes("float32") < 2**20]
    for case, dtype in ((case, dtype) for case in small for dtype in cases.DTYPES):
        values = cases.inputs(case, dtype)
        found = []
        for door in (python(op, "cpu"), c):
            monkeypatch.setattr(_dispatch, "_runner", lambda o, b, door=door: door if b == "cpu" else python(o, b))
            made = cases.arrays(case, values, layouts.torch_array, dtype)
            found.append(cases.run(case, made, "cpu"))
        for name, expected in found[0].items():
            same = _arrays.to_float64(found[1][name]).tobytes() == _arrays.to_float64(expected).tobytes()
            assert same, f"{case.id} {dtype}: {name}"


def tensors(*shapes, dtype=torch.float32):
    return [torch.ones(shape, dtype=dtype) for shape in shapes]


def good(op):
    """A call of an op that is fine: its fields, and what must live meanwhile."""
    a, b, D, square = tensors((2, 3, 5), (2, 3, 4), (2, 4, 5), (4, 5))
    row, dots, ids = torch.full((2,), 7.0), torch.full((2, 2), 7.0), torch.zeros((2, 3), dtype=torch.int64)
    state = torch.zeros(600, dtype=torch.float64), torch.zeros(600, dtype=torch.int64)
    scores, bias = torch.full((2, 3), 7.0), torch.full((4,), 7.0)
    number = torch.zeros((), dtype=torch.int64)
    calls = {
        "grad_stats": (a, b, D, torch.full((4, 5), 7.0), row, dots, False),
        "grad_gram": (a, b, None, None, dots),
        "embedding_stats": (ids, b, torch.ones(2, 6, 4), row, dots, -1),
        "affine_stats": (b, b, None, None, None, None, bias, bias.clone(), row, row.clone(), None, None, False),
        "gumbel_topk": (
            *(row, None, *state, number[None], row.double()[:1], torch.zeros(4, dtype=torch.int64)),
            *(2, 0, 1.0, True, True),
        ),
        "grad_project": (a, b, None, None, torch.full((2, 3, 2), 7.0), "gaussian", 1, 0, 0),
        "softmax_stats": (b, ids, *(scores.clone() for _ in range(4)), number, -100),
        "trajectory_match": (
            *([a], [b.new_zeros(30)], [a / 2], None, None, row[0], row.new_zeros(4).double(), [a * 7], None, 0),
        ),
        "adam_dots": (a, b, row, square, square, D, dots, 0.1, 0.9, 0.99, 1e-8, 0.5, 0.5),
    }
    return *c_abi.fields_of(op, *calls[op]), calls[op]


REFUSALS = [
    *((op, "dtype", value, f"dtype: expected FLOAT32, FLOAT64, BFLOAT16 or FLOAT16, got {got}")
      for op in _dispatch.OPS for value, got in ((0, "0"), (5, "INT32"), (99, "99"))),
    *((op, name, -1, f"{name}: expected at least 0, got -1") for op, name in (
        ("grad_stats", "tokens"), ("grad_gram", "d"), ("embedding_stats", "features"), ("affine_stats", "samples"),
        ("gumbel_topk", "k"), ("grad_project", "k_out"), ("softmax_stats", "classes"), ("trajectory_match", "first"),
        ("adam_dots", "directions"))),
    *((op, name, None, f"{name}: expected float32 {shape}, got NULL") for op, name, shape in (
        ("grad_stats", "a", "(2, 3, 5)"), ("grad_stats", "dots", "(2, 2)"), ("grad_gram", "out", "(2, 2)"),
        ("embedding_stats", "b", "(2, 3, 4)"), ("affine_stats", "x", "(2, 3, 4)"), ("gumbel_topk", "scores", "(2)"),
        ("grad_project", "out", "(2, 3, 2)"), ("softmax_stats", "logits", "(2, 3, 4)"),
        ("trajectory_match", "loss", "(1)"), ("adam_dots", "v", "(4, 5)"))),
    ("grad_stats", "a", 2, "a: expected an address that is a multiple of 4, got 2"),
    ("grad_stats", "samples", 2**61, f"a: expected fewer than 2^63 bytes, got float32 ({2**61}, 3, 5)"),
    ("grad_stats", "accumulate", 2, "accumulate: expected 0 or 1, got 2"),
    ("grad_stats", "reserved", 1, "reserved: expected 0, got 1"),
    ("grad_stats", "weight_grad_row", 4, "weight_grad_row: expected at least 5, so that rows do not overlap, got 4"),
    ("grad_stats", "direction_dtype", 2, "direction_dtype: expected FLOAT32, got FLOAT64"),
    ("grad_gram", "out_row", -2, "out_row: expected at least 2, so that rows do not overlap, got -2"),
    ("embedding_stats", "rows", 0, "ids: expected 0 <= id < 0, got 0 at sample 0, token 0"),
    ("embedding_stats", "id_dtype", 1, "id_dtype: expected INT32 or INT64, got FLOAT32"),
    ("gumbel_topk", "temperature", -1.0, "temperature: expected 0, or from 1e-300 to 1e300, got -1"),
    ("gumbel_topk", "capacity", 1,
     "capacity: expected room for all documents or for k + GHOSTGRAM_GUMBEL_SPARE, got 1"),
    ("grad_project", "kind", 0, "kind: expected RADEMACHER, GAUSSIAN or SPARSE, got 0"),
    ("softmax_stats", "label_dtype", 7, "label_dtype: expected FLOAT32, got BOOL"),
    ("softmax_stats", "bad_row", None, "bad_row: expected int64 (1), got NULL"),
    ("trajectory_match", "tensors", None, "tensors: expected an address, got NULL"),
    ("adam_dots", "eps", 0.0, "eps: expected 0 < eps <= 1, got 0"),
    ("adam_dots", "beta1", float("nan"), "beta1: expected 0 <= beta1 < 1, got nan"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "field", "value", "message"), REFUSALS)
def test_what_is_wrong_is_said_before_anything_is_written(op, field, value, message, lib):
    fields, _alive, arrays = good(op)
    call = getattr(lib, f"ghostgram_{op}")
    before = [x.clone() for x in arrays if torch.is_tensor(x)]
    assert call(c_abi.struct(op, fields | {field: value})) == INVALID
    assert lib.ghostgram_last_error().decode() == f"ghostgram_{op}: {message}"
    assert all(torch.equal(x, y) for x, y in zip(filter(torch.is_tensor, arrays), before, strict=True))
    assert call(c_abi.struct(op, fields)) == c_abi.CONSTANTS["OK"], lib.ghostgram_last_error()


def test_outputs_that_are_not_wanted_are_null(lib):
    fields, _alive, arrays = good("softmax_stats")
    bad_row = arrays[-2].fill_(7)
    nothing = dict.fromkeys(("loss", "el2n", "entropy", "max_probability"))
    assert lib.ghostgram_softmax_stats(c_abi.struct("softmax_stats", fields | nothing)) == c_abi.CONSTANTS["OK"]
    assert bad_row == -1


def test_structs_may_grow(lib):
    """A caller of a later version is served as long as it asks for nothing that this one does not know."""
    fields, _alive, arrays = good("grad_gram")
    known = c_abi.STRUCTS["ghostgram_grad_gram_args"]
    later = type("later", (known,), {"_fields_": [("more", ctypes.c_int64)]})
    call = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(("ghostgram_grad_gram", lib))
    args = later(struct_size=ctypes.sizeof(later), **fields)
    assert call(ctypes.addressof(args)) == c_abi.CONSTANTS["OK"]
    assert arrays[-1][0, 0] == 9 * 20
    args.more = 1
    assert call(ctypes.addressof(args)) == INVALID
    assert f"args: expected nothing set beyond the {ctypes.sizeof(known)} bytes" in lib.ghostgram_last_error().decode()
    args.struct_size = 8
    assert call(ctypes.addressof(args)) == INVALID
    assert lib.ghostgram_last_error().decode().endswith(f"{ctypes.sizeof(known)} or more, got 8")
    assert call(None) == INVALID
    assert lib.ghostgram_last_error().decode() == "ghostgram_grad_gram: args: expected an address, got NULL"


def test_threads_are_counted_and_set(lib):
    before = lib.ghostgram_num_threads()
    assert lib.ghostgram_set_num_threads(0) == INVALID
    assert lib.ghostgram_last_error() == b"ghostgram_set_num_threads: threads: expected 1 to 4096, got 0"
    assert lib.ghostgram_set_num_threads(3) == c_abi.CONSTANTS["OK"]
    assert lib.ghostgram_num_threads() == 3
    lib.ghostgram_set_num_threads(before)


def test_a_build_without_cuda_says_so(lib):
    state = lib.ghostgram_cuda_state().decode()
    if state == "on":
        pytest.skip("this build has CUDA")
    fields, *_alive = good("grad_gram")
    args, size = c_abi.struct("grad_gram", fields), ctypes.c_size_t(7)
    assert lib.ghostgram_grad_gram_cuda_workspace(args, size) == c_abi.CONSTANTS["NO_CUDA"]
    assert lib.ghostgram_last_error().decode() == f"ghostgram_grad_gram_cuda_workspace: CUDA is {state}"
    assert lib.ghostgram_grad_gram_cuda(args, None, 0, None) == c_abi.CONSTANTS["NO_CUDA"]
    assert size.value == 7


def test_cuda_kernels_are_launched_on_the_callers_stream(builder):
    """Emulated on tests/simt: what a workspace must be, and what comes out beside the CPU's numbers."""
    path = builder.simt_extension("grad_stats")
    lib = c_abi.load(path)
    fields, _alive, (a, b, D, *outputs, _) = good("grad_stats")
    assert c_abi.load(c_abi.library()).ghostgram_grad_stats(c_abi.struct("grad_stats", fields)) == c_abi.CONSTANTS["OK"]
    expected = [x.clone() for x in outputs]
    with Card(path, Settings(1, 100, at_end=True)) as card:
        inputs = [card.array(x.numpy(), "float32", "contiguous") for x in (a, b, D)]
        found = [card.empty(tuple(x.shape), "float32", 4) for x in outputs]
        args = c_abi.struct("grad_stats", c_abi.fields_of("grad_stats", *inputs, *found, False)[0])
        size = ctypes.c_size_t()
        assert lib.ghostgram_grad_stats_cuda_workspace(args, size) == c_abi.CONSTANTS["OK"]
        workspace = card.empty((size.value // 4,), "float32")
        door = lib.ghostgram_grad_stats_cuda
        for given, message in {
            (c_abi.at(workspace), size.value - 1, None): f"workspace_bytes: expected at least {size.value}, got",
            (c_abi.at(workspace) + 8, size.value, None): "workspace: expected an address that is a multiple of 16",
            (None, size.value, None): "workspace: expected an address, got NULL",
        }.items():
            assert door(args, *given) == INVALID
            assert lib.ghostgram_last_error().decode().startswith(f"ghostgram_grad_stats_cuda: {message}")
        assert door(args, c_abi.at(workspace), size.value, 0xBAD) == c_abi.CONSTANTS["CUDA_ERROR"]
        assert b"stream" in lib.ghostgram_last_error()
        assert door(args, c_abi.at(workspace), size.value, None) == c_abi.CONSTANTS["OK"], lib.ghostgram_last_error()
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x.clone(), y, rtol=1e-5, atol=0)
        args.dtype = args.direction_dtype = c_abi.CONSTANTS["FLOAT64"]
        assert lib.ghostgram_grad_stats_cuda_workspace(args, size) == INVALID
        assert b"dtype: expected FLOAT32, BFLOAT16 or FLOAT16 on a card" in lib.ghostgram_last_error()
