"""grad_stats in Triton, run by Triton's interpreter: it agrees with the reference, and these cases catch mistakes.

The interpreter is chosen by the environment when triton is imported: this file, run as a script in a process of its
own, tries the kernel and its mutants on all cases and prints what it found as JSON.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ghostgram import _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.cases.grad_stats import CASES, LARGE, Case
from ghostgram.testing.compare import cases_of, error_over_bound

WORK_LIMIT = 10e6  # FLOP: about a second in the interpreter, whose tiles are small
EXTRA = [
    Case(2, 2, 4129, 1, 1),  # more tiles than one step of the sum over tiles takes
    Case(8, 600, 5, 7, 2),  # long enough to be cut into spans of samples
    Case(8, 600, 5, 7, 1, accumulate=True),
]
RUNS = [
    (case, dtype)
    for case in CASES + LARGE + EXTRA
    if case.flops <= WORK_LIMIT
    for dtype in ("float32", "bfloat16", "float16")
]

# What a slip of the pen would do: (text that occurs once in the source, what it becomes). Out-of-bounds reads stay
# inside the larger array of the "sliced" case, whose margins are NaN.
MUTANTS = {
    "no mask on tokens": ("step_live = t + steps < tokens", "step_live = steps < TOKENS"),
    "no mask on columns of a": ("mask=step_live[:, None] & col_live[None, :]", "mask=step_live[:, None]"),
    "no mask on rows of b": ("mask=row_live[:, None] & step_live[None, :]", "mask=step_live[None, :]"),
    "token loop one short": ("tl.range(0, tokens, TOKENS)", "tl.range(0, tokens - 1, TOKENS)"),
    "tokens not advanced": ("b_at += TOKENS * b_token", "b_at += 0"),
    "last sample dropped": ("first + samples_per_span, samples)", "first + samples_per_span, samples - 1)"),
    "samples overwrite each other": ("total += gradient", "total = gradient"),
    "dots shifted by one": ("tl.store(sums + 1 + k,", "tl.store(sums + k,"),
    "one direction for all": ("D_at += D_direction", "D_at += 0"),
    "previous weight_grad lost": ("ACCUMULATE=accumulate and not cut", "ACCUMULATE=False"),
    "previous weight_grad lost by spans": ("weight_grad + total if accumulate else total", "total"),
    "spans overwrite each other": ("span.to(tl.int64) * weight_grad_span", "0"),
    "tiles of one step only": ("sums += tl.load(", "sums = tl.load("),
}


def _worst(case, dtype):
    return max(error_over_bound("grad_stats", case, dtype, "triton", layouts.torch_array).values())


def _bits_repeat():
    cases = cases_of("grad_stats")
    case = Case(5, 33, 70, 65, 2)
    arrays = cases.arrays(case, cases.inputs(case, "float32"), layouts.torch_array, "float32")
    first, second = (cases.run(case, arrays, "triton") for _ in range(2))
    return all(first[name].equal(second[name]) for name in first)


def _use(source):
    """Makes this file the Triton kernel of grad_stats."""
    name = "ghostgram.triton_kernels.grad_stats"
    spec = importlib.util.spec_from_file_location(name, source)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    _dispatch._runner.cache_clear()


def _kernel_source():
    return Path(importlib.util.find_spec("ghostgram.triton_kernels.grad_stats").origin).read_text()


def main(folder):
    found = {
        "worst": {f"{case.id}-{dtype}": _worst(case, dtype) for case, dtype in RUNS},
        "bits repeat": _bits_repeat(),
        "caught": {},
    }
    source = _kernel_source()
    cases = [case for case in CASES if case.layout == "sliced"] + EXTRA + CASES[4:]  # "sliced" first: see MUTANTS
    for number, (name, (text, mutation)) in enumerate(MUTANTS.items()):
        mutant = Path(folder, f"mutant{number}.py")
        mutant.write_text(source.replace(text, mutation))
        _use(mutant)
        found["caught"][name] = next((case.id for case in cases if _worst(case, "float32") > 1), None)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("mutants"))]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("run", [f"{case.id}-{dtype}" for case, dtype in RUNS])
def test_agrees_with_reference(found, run):
    assert found["worst"][run] <= 1


def test_bits_repeat(found):
    assert found["bits repeat"]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_catches(found, mutant):
    assert _kernel_source().count(MUTANTS[mutant][0]) == 1
    assert found["caught"][mutant] is not None


@pytest.mark.parametrize("samples", [1, 2, 7, 8, 9, 64])
def test_no_span_is_empty(samples):
    kernels = pytest.importorskip("ghostgram.triton_kernels.grad_stats", reason="triton is not installed")
    for tiles in (1, 30, 36, 131, 132, 133, 1024):
        spans = kernels.sample_spans(tiles, samples, 1024, 132, True)
        assert 1 <= spans <= samples
        assert (spans - 1) * -(-samples // spans) < samples


if __name__ == "__main__":
    main(sys.argv[1])
