"""What `ghostgram doctor` finds out: what is installed, which kernels run here, whether they are right, the roofs."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ghostgram import _C, _dispatch
from ghostgram.testing import layouts, roofline
from ghostgram.testing.compare import cases_of, error_over_bound

SELF_CHECK_CASES = 6
ROOF_DTYPES = ("float32", "float64", "bfloat16")


@dataclass(frozen=True)
class Check:
    """The worst error of one op on one backend, in units of the derived bound: at most 1 is right."""

    op: str
    backend: str
    worst: float
    cases: int

    @property
    def passed(self) -> bool:
        """Whether every result lies within its bound."""
        return self.worst <= 1


@dataclass(frozen=True)
class Report:
    """All findings, ready for JSON."""

    versions: dict[str, str | None]
    processor: str
    isa: str
    isas_built: tuple[str, ...]
    threads: int
    cuda: str
    cuda_devices: int
    backends: dict[str, dict[str, str | None]]
    """op -> backend -> None when it is ready, else the reason why not."""
    checks: list[Check]
    roofs: dict[str, roofline.Roofs]

    @property
    def healthy(self) -> bool:
        """Whether every self-check passed."""
        return all(check.passed for check in self.checks)


def examine(seconds: float) -> Report:
    """Examines this installation; each roof is measured for `seconds`."""
    count_devices = getattr(_C.cuda, "device_count", None)  # only a build with CUDA has it
    backends = {op: {b: _dispatch.why_not(op, b) for b in _dispatch.BACKENDS} for op in _dispatch.OPS}
    # The reference is what the others are checked against.
    ready = [(op, b) for op, row in backends.items() for b, why in row.items() if why is None and b != "reference"]
    return Report(
        versions={
            "python": platform.python_version(),
            **{name: installed(name) for name in ("ghostgram", "numpy", "torch", "jax", "triton")},
        },
        processor=roofline.processor(),
        isa=_C.isa(),
        isas_built=_C.isas,
        threads=_C.num_threads(),
        cuda=_C.cuda_state,
        cuda_devices=count_devices() if count_devices else 0,
        backends=backends,
        checks=[self_check(op, backend) for op, backend in ready],
        roofs={dtype: roofline.measure(seconds, dtype) for dtype in ROOF_DTYPES},
    )


def self_check(op: str, backend: str) -> Check:
    """Runs a handful of the op's small cases, in every dtype that NumPy can make and the backend reads."""
    on_cpu = backend == "cpu"
    every = cases_of(op).CASES
    cases = every[:: -(-len(every) // SELF_CHECK_CASES)]
    dtypes = [d for d in cases_of(op).DTYPES if d != "bfloat16" and (on_cpu or d != "float64")]
    make = layouts.numpy_array if on_cpu else layouts.array_for(backend)
    ratios = [max(error_over_bound(op, case, dtype, backend, make).values()) for case in cases for dtype in dtypes]
    return Check(op, backend, max(ratios), len(ratios))


def installed(package: str) -> str | None:
    """The version of a package, without importing it; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
