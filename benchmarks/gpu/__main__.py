"""python -m benchmarks.gpu: builds, validates every op on the card, times it against its rivals, times a whole step.

Needs torch with CUDA, cmake and a C++ compiler, nvcc for the CUDA kernels and triton for the Triton ones; says what is
missing. Takes some minutes, asks nothing, and writes benchmarks/results/<device>.json part by part: each part runs in
a process of its own when the one before it took the card down, and is given up when it hangs.

`--rehearse` runs the same on this processor with tiny sizes, to see that it runs: Triton's kernels interpreted, and the
CUDA ones of an extension module for tests/simt, if one is named.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

BACKENDS = ("cuda", "triton")
DTYPES = ("bfloat16", "float32")
VALIDATION_SECONDS = 12  # per op and backend: Triton compiles anew for nearly every shape
STEP_OPS = ("grad_stats", "affine_stats", "embedding_stats")
HANGS_AFTER = 120  # seconds of one part
MODULE = "ghostgram._C"


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on this processor; numbers mean nothing")
    parser.add_argument("--simt", type=Path, help="in a rehearsal: an extension module whose CUDA device is tests/simt")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where results go")
    parser.add_argument("--part", action="append", help=argparse.SUPPRESS)  # what a child process does
    parser.add_argument("--finished", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return run_parts(options)
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    if options.rehearse:
        environment["TRITON_INTERPRET"] = "1"
    else:
        from benchmarks.gpu import build

        if missing := build.missing():
            sys.exit("missing here: " + ", ".join(missing))
        environment["PYTHONPATH"] = f"{build.build()}{os.pathsep}{environment['PYTHONPATH']}"
    failed = supervise(all_parts(), environment)
    print(f"{time.perf_counter() - started:.0f} s in all; {len(failed)} parts failed {failed or ''}", flush=True)
    sys.exit(bool(failed))


def all_parts() -> list[str]:
    ops = sorted(path.stem.removesuffix("_cpu") for path in (ROOT / "csrc").glob("*/*_cpu.cpp"))
    ops.remove("roofs")
    return ["roofs", *(f"validate {op} {b}" for op in ops for b in BACKENDS), *(f"time {op}" for op in ops), "step"]


def supervise(parts: list[str], environment: dict[str, str]) -> list[str]:
    """Runs the parts in a child; one that dies loses the part it died of, and the next child does the rest."""
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        finished = Path(folder, "finished")
        while parts:
            finished.write_text("")
            wanted = [word for part in parts for word in ("--part", part)]
            command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], *wanted, "--finished", str(finished)]
            subprocess.run(command, cwd=ROOT, env=environment, check=False)
            done = [json.loads(line) for line in finished.read_text().splitlines()]
            failed += [part for part, fine in done if not fine]
            parts = parts[len(done) :]
            if parts:
                print(f"{parts[0]}: the process ended", flush=True)
                failed.append(parts.pop(0))
    return failed


def run_parts(options: argparse.Namespace) -> None:
    bench = Bench(options.rehearse, options.simt)  # first, because a rehearsal chooses the extension module
    from recording import save

    for part in options.part:
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        started = time.perf_counter()
        kind, *arguments = part.split()
        fine = True
        rows = []
        for row in getattr(bench, kind)(*arguments):
            rows.append({"part": part, **row})
            fine &= not row.get("failed")
            cells = (
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
            print(f"{part}:  " + "  ".join(cells), flush=True)
        save(
            f"gpu {kind}", rows, lambda row, part=part: row["part"] != part, device=bench.card.name, folder=options.out
        )
        print(f"{part}: {time.perf_counter() - started:.1f} s", flush=True)
        with options.finished.open("a") as file:
            file.write(json.dumps([part, fine]) + "\n")


class Bench:
    """The parts, each a method that yields its rows."""

    def __init__(self, rehearse: bool, simt: Path | None) -> None:
        if simt is not None:
            _use_simt(simt)
        from benchmarks.gpu import card

        self.card = card.Rehearsal() if rehearse else card.Gpu()
        self.rounds = 1 if rehearse else 20
        self._rates: dict[str, float] | None = None

    def rates(self) -> dict[str, float]:
        """Measured once a process."""
        from benchmarks.gpu import card
        from ghostgram.testing.turns import alternated

        if self._rates is None:
            self._rates = card.measured(self.card, alternated)
        return self._rates

    def roofs(self) -> Iterator[dict[str, Any]]:
        from benchmarks.gpu import card

        yield self.rates() | card.sheet(self.card.name)

    def validate(self, op: str, backend: str) -> Iterator[dict[str, Any]]:
        """Every case of the op against the float64 reference, in a random order, as far as the time goes."""
        from ghostgram import _dispatch
        from ghostgram.testing import layouts
        from ghostgram.testing.compare import cases_of, error_over_bound

        if reason := _dispatch.why_not(op, backend):
            yield {"absent": reason}
            return
        cases = cases_of(op)
        runs = [(case, dtype) for case in cases.CASES for dtype in cases.DTYPES if dtype != "float64"]
        random.Random(0).shuffle(runs)
        runs += [(case, dtype) for case in cases.LARGE for dtype in cases.DTYPES if dtype != "float64"]
        seconds, started, worst, failures, count = VALIDATION_SECONDS, time.perf_counter(), 0.0, [], 0
        if self.card.tiny:
            seconds, runs = 0.3, [run for run in runs if run[0].flops < 1e5]
        for case, dtype in runs:
            if time.perf_counter() - started > seconds:
                break
            count += 1
            try:
                make = partial(layouts.torch_array, device=self.card.device)
                found = max(error_over_bound(op, case, dtype, backend, make).values())
            except Exception as error:  # whatever it is, the others are worth knowing
                failures.append(f"{case.id} {dtype}: {error}")
                if "CUDA error" in str(error):
                    break  # the context is lost; the next part starts with a new one
                continue
            worst = max(worst, found)
            if not found <= 1:
                failures.append(f"{case.id} {dtype}: {found:.3g} times the bound")
        yield {"cases": count, "of": len(runs), "error_over_bound": worst, "failed": failures}

    def time(self, op: str) -> Iterator[dict[str, Any]]:
        """Our front door and its rivals in turns; a backend that is not here has no row."""
        from benchmarks.gpu import card, contests
        from ghostgram import _dispatch
        from ghostgram.testing.roofline import percent_of_roof
        from ghostgram.testing.turns import alternated

        backends = [backend for backend in BACKENDS if _dispatch.why_not(op, backend) is None]
        for dtype in DTYPES if backends else ():
            roofs = card.roofs_for(dtype, self.rates())
            for contest in contests.CONTESTS[op](self.card.device, dtype, self.card.tiny):
                shape = {"shape": contest.shape, "dtype": dtype}
                ours = {backend: partial(contest.ours, backend) for backend in backends}
                errors = {name: error for name, way in (ours | contest.rivals).items() if (error := _error(way))}
                if errors:
                    yield shape | {"failed": [f"{name}: {error}" for name, error in errors.items()]}
                ways = {name: way for name, way in (ours | contest.rivals).items() if name not in errors}
                seconds = alternated(self.card.seconds, ways, rounds=self.rounds)
                rivals = {name: seconds[name] for name in contest.rivals if name in ways}
                flops, moved = contest.case.flops, contest.case.bytes(dtype)
                for backend in [name for name in ours if name in ways]:
                    took = seconds[backend]
                    row = shape | {
                        "backend": backend, "ms": 1e3 * took,
                        "percent_of_roof": percent_of_roof(flops, moved, took, roofs),
                        "tflops": flops / took / 1e12, "gbytes": moved / took / 1e9,
                        "host_us": 1e6 * _host_seconds(ours[backend]),
                        **{f"over {name}": took / theirs for name, theirs in rivals.items()},
                    }  # fmt: skip
                    if contest.expected is not None:
                        row["difference"] = contests.difference(ours[backend](), contest.expected())
                    yield row

    def step(self) -> Iterator[dict[str, Any]]:
        """A whole training step, and what valuing its samples adds."""
        from benchmarks.gpu import step
        from ghostgram import _dispatch
        from ghostgram.testing.turns import alternated

        lacking = [op for op in STEP_OPS if all(_dispatch.why_not(op, backend) for backend in BACKENDS)]
        lacking += [] if importlib.util.find_spec("pyarrow") else ["pyarrow"]
        if lacking:
            yield {"absent": f"a step with InRunShapley needs {' and '.join(lacking)}"}
            return

        sizes = step.TINY if self.card.tiny else step.SMALL
        given = step.batch(self.card.device, sizes, 2 if self.card.tiny else 16)
        ways = {name: build(self.card.device, sizes, *given) for name, build in step.STEPS.items()}
        ways["In-Run Shapley"]()  # Adam's first step has no second moment to go by
        seconds = alternated(self.card.seconds, ways, rounds=1 if self.card.tiny else 10)
        peaks = {name: self.card.peak_bytes(way) for name, way in ways.items()}
        for name in ways:
            yield {
                "step": name, "ms": 1e3 * seconds[name], "over plain": seconds[name] / seconds["plain"],
                "operators": step.operators(ways[name]), "tokens_per_s": given[0].numel() / seconds[name],
                "its peak over plain's": peaks[name] / peaks["plain"],
            }  # fmt: skip


def _error(call: Any) -> str:
    """What goes wrong when it is called; empty when nothing does."""
    try:
        call()
    except Exception as error:  # a rival that this torch does not know, or a matrix that this card has no room for
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


def _host_seconds(call: Any) -> float:
    """How long the caller is held by one call, the card's work aside."""
    started = time.perf_counter()
    for _ in range(5):
        call()
    return (time.perf_counter() - started) / 5


def _use_simt(path: Path) -> None:
    """Makes the module the place of CUDA kernels, whose device is this processor."""
    sys.setdlopenflags(os.RTLD_LAZY)
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[MODULE] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ctypes.CDLL(str(path)).simt_configure(ctypes.c_uint64(1), ctypes.c_int64(228 << 10))

    from ghostgram import _arrays

    _arrays.device_type = lambda _: "cuda"


if __name__ == "__main__":
    main()
