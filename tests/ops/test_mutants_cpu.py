"""The cases notice broken kernels: every seeded mutant of a CPU kernel must disagree with the reference somewhere.

A mutant is one textual edit of a kernel's source, or of a header that it names third, compiled for the instruction set
of this machine into an extension of its own; `check_cases.py` runs it through the comparison of test_rooms. The
unedited kernel, built the same way, must pass: a harness that fails everything would catch every mutant.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ghostgram import _C

TESTS = Path(__file__).parents[1]
MUTANTS = {
    "grad_stats": {
        "blocks of tokens forget the earlier ones": (
            "acc[r][v] = t ? load(",
            "acc[r][v] = false ? load(",
            "core/gradient_tiles.h",
        ),
        "a norm keeps its last tile alone": ("add_tile_row(sums[0],", "add_tile_row(sums[0] = vec<double>{},"),
        "accumulate is ignored": ("continued || s.accumulate", "continued"),
        "every direction is the first": ("+ k * s.D_direction * size", "+ 0 * s.D_direction * size"),
    },
    "grad_gram": {
        "pairs of different samples count twice": ("same && i == j ? twice : 1) * double(sum", "twice) * double(sum"),
        "tiles on the diagonal are skipped": ("same ? most(first, k) : first", "same ? most(first, k + 1) : first"),
        "features beyond whole vectors are dropped": ("if (s * width < n)", "if (false)"),
        "the first piece of a long sample is lost": ("int64_t piece = 0; piece <", "int64_t piece = 1; piece <"),
        "pairs of a short sample's tokens count once": ("(k == l && r == c ? 1 : 2)", "1"),
        "a short sample's later panels are dropped": ("first < n; first += panel_features", "first < 1; first += n"),
        "rows without a token repeat the last one": ("t < tokens ? features : 0", "features"),
        "nothing is mirrored": ("if (s.symmetric && !s.diagonal)", "if (false)"),
    },
    "embedding_stats": {
        "repeated tokens count again": ("link[slots[slot]].first = false;", ""),
        "padding contributes": ("id != s.padding_idx || s.padding_idx < 0", "true"),
        "all samples use the first one's ids": ("chained == s.samples ? i : 0", "0"),
        "products beyond whole vectors are dropped": ("rest += x[c] * widen(y[c]);", ""),
    },
    "affine_stats": {
        "the mean is subtracted after scaling": (
            "(load_wide(x[k] + c) - mean[k]) * rstd[k]",
            "(load_wide(x[k] + c) * rstd[k] - mean[k])",
        ),
        "tokens that are no four are dropped": ("for (; t < last; ++t)", "for (; false; ++t)"),
        "a cut of tokens is lost": ("int64_t cut = 1; cut < totals", "int64_t cut = 2; cut < totals"),
        "the bias gradient reads the weight's sums": ("finish_grad(s.bias, s.features,", "finish_grad(s.bias, 0,"),
        "every channel is of the first group": ("group = f / s.features_per_group", "group = 0 * f"),
        "the mean of a channel is not subtracted": ("y * (load_wide(x + t) - mean)", "y * load_wide(x + t)"),
        "space that is no whole vector is dropped": ("for (; t < s.tokens; ++t) {", "for (; false; ++t) {"),
        "a chain of space is lost": ("(w[0] + w[1]) + (w[2] + w[3])", "(w[0] + w[1]) + w[2]"),
        "a cut keeps its first channel alone": ("last, total(i, 0)) : sum", "first + 1, total(i, 0)) : sum"),
        "an empty space has a statistic": ("with_x && s.tokens ?", "with_x ?"),
    },
    "gumbel_topk": {
        "noise forgets the upper half of an id": (
            "noise_bits(load(id + j), seed)",
            "noise_bits(load(id + j) & 0xffffffffu, seed)",
        ),
        "the bound is too low": ("bound_of_key(bound, bits);", "bound_of_key(bound, bits) - ln2;"),
        "a block that found no room is lost": ("        full = true;", "        full = true, span.first += n;"),
        "places of repeated documents stay empty": ("if (distinct >= s.k || dealt == held)", "if (true)"),
        "ties go to the larger id": ("? id(x.pick) < id(y.pick) :", "? id(x.pick) > id(y.pick) :"),
        "the threshold is too high": ("*s.threshold = s.keys[s.k - 1]", "*s.threshold = s.keys[s.k / 2]"),
    },
    "grad_project": {
        "blocks of features forget the earlier ones": ("acc[r][v] = continued ?", "acc[r][v] = false ?"),
        "rows beyond a word repeat its signs": ("(row + q) / 32 % 4", "0"),
        "sines keep the sign of the second half turn": ("^ ((quarter & 2) << 62)", ""),
        "a drawn matrix is not scaled": ("left.P.data ? 1.0 : double(left.k)", "1.0"),
        "blocks of tokens are scattered apart from the earlier ones": ("acc[r][c] = t ?", "acc[r][c] = false ?"),
        "every nonzero draws the same": ("/ 4, 2 + j)", "/ 4, 2)"),
        "the last tasks' tables are lost": ("int64_t cut = 0; cut < cuts", "int64_t cut = 0; cut < 1"),
        "pieces of a sample overwrite each other": ("(piece % pieces ? sum : 0)", "0"),
    },
    "softmax_stats": {
        "a new largest logit goes unnoticed": ("if (any < 0)", "if (false)"),
        "the largest logit counts among the rest": ("found.rest.sum -= 1;", ""),
        "a largest logit that is no more is forgotten": ("if (demoted > -infinity<double>)", "if (false)"),
        "squares are moved to a new reference once": ("scale * scale * part.rest.squares", "scale * part.rest.squares"),
        "the spread stays where the old reference was": ("part.rest.spread + below *", "part.rest.spread + 0 *"),
        "el2n leaves the label among the others": ("except = 1 + (others - w)", "except = 1 + others"),
        "the first cut of a long row is lost": (
            "cut = 0; cut < cuts; ++cut)\n        whole.merge",
            "cut = 1; cut < cuts; ++cut)\n        whole.merge",
        ),
        "classes beyond whole vectors are dropped": ("sums[1].add(load_some(", "if (false) sums[1].add(load_some("),
        "a distribution's first class is near 1 by subtraction": ("(1 - qc) - missing", "(1 - missing) - qc"),
        "classes that cannot be make the loss NaN": ("qc != 0 ? qc * (first - zc) : vec<Acc>{}", "qc * (first - zc)"),
    },
    "trajectory_match": {
        "one scalar too many is dropped": ("least(s.first - scalars, size)", "least(s.first - scalars + 1, size)"),
        "a chunk ends with its first tensor": ("places[t].begin < end; ++t)", "places[t].begin < begin + 1; ++t)"),
        "scalars beyond whole vectors are dropped": ("if (i < to) {", "if (false) {"),
        "weights of tensors do not reach num": ("to.num += weight * x.num", "to.num += x.num"),
        "a gradient is not masked": ("mask == Mask::real ? g * m : g", "g"),
        "gradients of dropped scalars are not written": ("(what & gradients) && kept > from", "false"),
    },
    "adam_dots": {
        "the momentum's part is left out": ("state.pull * square - scaled", "-scaled", "core/adam_step.h"),
        "the step's sign is lost": ("x * p, root0", "larger(x, -x) * p, root0", "core/adam_step.h"),
        "squares out of range": ("of_bits(~larger_bits & Range::exponent)", "1 - batch<T>{}", "core/adam_step.h"),
        "eps is not scaled": ("eps * p", "eps", "core/adam_step.h"),
        "nothing keeps denominators from 0": ("0x1p-118f", "0", "core/adam_step.h"),
        "v without its bias correction": ("beta2 / bc2)), eps", "beta2)), eps", "core/adam_step.h"),
        "m without its bias correction": ("/ bc1 / x_of_g", "/ x_of_g", "core/adam_step.h"),
        "every sample is clipped as the first": ("(s.clip)[i] *", "(s.clip)[0] *"),
        "a tile's last row is left out": ("rows = least(rows, tile_rows);", "rows = least(rows, tile_rows - 1);"),
        "a tile's second vector is left out": ("cols > lanes<Acc> ?", "cols > 2 * lanes<Acc> ?"),
        "every direction is the first": ("+ r * s.D_direction * size", "+ 0 * s.D_direction * size"),
        "m and v are exchanged": (
            "s.v, s.v_row, s.moment_dtype, scratch + root",
            "s.v, s.v_row, s.moment_dtype, scratch + pull",
        ),
    },
}
if _C.isa() == "avx512bf16":
    MUTANTS["grad_stats"]["a pair's second token is lost"] = (
        "from + token) << 16",
        "from + token) << 16 & 0",
        "core/gradient_tiles.h",
    )
    MUTANTS["grad_gram"]["a pair's second feature is lost"] = ("(__m512bh)x,", "(__m512bh)((vec<uint32_t>)x & 0xffff),")
EDITS = {(op, "unedited"): None for op in MUTANTS} | {
    (op, name): edit for op, edits in MUTANTS.items() for name, edit in edits.items()
}


@pytest.fixture(scope="module")
def caught(builder):
    """(op, mutant) -> what check_cases.py complained of."""

    def verdict(key: tuple[str, str]) -> str:
        op, edit = key[0], EDITS[key]
        source, *_ = [*edit[2:], op] if edit else [op]
        library = builder.extension(edits={source: edit[:2]} if edit else {})
        env = os.environ | {"GHOSTGRAM_EXTENSION": str(library), "PYTHONPATH": str(TESTS)}
        for dtype in ("float32", "bfloat16"):  # in this order: float32 needs no torch, and catches nearly all
            command = [sys.executable, TESTS / "check_cases.py", op, dtype]
            if complaint := subprocess.run(command, env=env, capture_output=True, text=True).stderr:
                return complaint
        return ""

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(EDITS, pool.map(verdict, EDITS), strict=True))


@pytest.mark.parametrize("key", [pytest.param(key, id="-".join(key)) for key in EDITS])
def test_only_mutants_are_caught(key, caught):
    if key[1] == "unedited":
        assert caught[key] == ""
    else:
        assert "beyond its bound" in caught[key]
