"""Cases of trajectory_match: every kind of mask; a loss, a loss with its gradient, a gradient alone, its derivative."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram import _dispatch
from ghostgram.testing import layouts

F64 = NDArray[np.float64]
DTYPES = ("float32", "float64", "bfloat16", "float16")
SMALLEST_NORMAL = {"float64": 2.0**-1022, "float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-14}
LOSS_GRADIENT = 0.75


@dataclass(frozen=True)
class Case:
    """A list of tensors by their sizes; `first` counts dropped scalars, `mask` names another kind of mask.

    `wanted` is "loss", "both" (with its gradient), "gradient" (D is known) or "derivative" (the same without target).
    `layout` "sliced" starts every tensor one scalar into its memory. Values are around 1 in units of `unit`, start and
    target about `apart` of that from each other.
    """

    sizes: tuple[int, ...]
    wanted: str = "both"
    mask: str = "none"
    first: int = 0
    layout: str = "contiguous"
    apart: float = 0.1
    unit: float = 1.0

    def __post_init__(self) -> None:
        if self.first >= max(sum(self.sizes), 1):
            raise ValueError(
                f"first: expected fewer than all {sum(self.sizes)} scalars to be dropped, got {self.first}"
            )

    @property
    def id(self) -> str:
        """A name for test reports."""
        sizes = "_".join(map(str, self.sizes)) if len(self.sizes) < 8 else f"{len(self.sizes)}x{max(self.sizes)}"
        first = f"-first{self.first}" if self.first else ""
        return f"P{sizes}-{self.wanted}-{self.mask}{first}-{self.layout}-apart{self.apart:g}-unit{self.unit:g}"

    @property
    def flops(self) -> int:
        """Multiply-adds count two: differences and squares for num, D and S; for the gradient three more."""
        return sum(self.sizes) * {"loss": 8, "both": 11, "gradient": 4, "derivative": 3}[self.wanted]

    def bytes(self, dtype: str) -> int:
        """What the kernel must move: a gradient with its loss reads target twice, because it needs D first."""
        item, wide = layouts.ITEM[dtype], 8 if dtype == "float64" else 4
        per_scalar = {"loss": 3 * item, "both": 4 * item + wide, "gradient": 3 * item, "derivative": 2 * item}
        mask = {"bool": 1, "real": wide}.get(self.mask, 0) * (2 if self.wanted == "both" else 1)
        return (sum(self.sizes) - self.first) * (per_scalar[self.wanted] + mask)


# fmt: off
CONVNET_D3 = (3456, 128, 128, 128, 147456, 128, 128, 128, 147456, 128, 128, 128, 20480, 10)
WANTED = ("loss", "both", "gradient", "derivative")
CASES = [
    # Empty and tiny tensors; one off a vector, the grid of 64, a task of 32,768; primes.
    *(Case((1,), wanted) for wanted in WANTED),
    Case((0, 1, 0)), Case((3, 0, 2, 1)), Case((15, 16, 17)), Case((63, 64, 65, 31, 33), "gradient"), Case((7, 13, 101)),
    Case((32767, 1)), Case((32768, 2), "loss"), Case((32769,)), Case((1, 32768, 5), "gradient"), Case((65537, 3, 127)),
    # Masks: a front that ends inside, between and at the last scalar of tensors; weights with a 0; bool and real ones.
    Case((40, 70, 9), first=1), Case((40, 70, 9), first=40), Case((40, 70, 9), "gradient", first=57), Case((40, 70, 9), first=118),
    Case((33000, 33000), "loss", first=32769), Case((33000, 33000), first=65000),
    *(Case((40, 0, 71, 9), wanted, mask) for mask in ("weights", "bool", "real") for wanted in WANTED),
    Case((33001, 64), mask="bool"), Case((33001, 64), mask="real"), Case((33001, 64), mask="weights"), Case((33001, 64), "gradient", "weights"),
    # Memory: unaligned, and a gradient that goes past the caches.
    Case((17, 129, 1030), layout="sliced"), Case((17, 129, 1030), "gradient", "real", layout="sliced"), Case((17, 129, 1030), mask="bool", layout="sliced"),
    Case((2_200_003,)), Case((1_100_001, 3, 1_100_001), "gradient", layout="sliced"),
    # Near and far: snapshots that almost agree, squares beyond the range of float32.
    Case((1000, 37), apart=1e-3), Case((1000, 37), "loss", apart=30.0), Case((500, 37), unit=1e-25), Case((500, 37), "gradient", unit=1e25),
]

LARGE = [Case(CONVNET_D3, first=80_002), Case(CONVNET_D3, "loss", "real"), Case(CONVNET_D3, "gradient", "bool")]
TYPICAL = [Case(CONVNET_D3, "both"), Case((1_000_000,) * 3, "both")]
"""What `ghostgram bench` times: sizes that layers of small models have, and that the reference is done with in a second."""
# fmt: on


def inputs(case: Case, dtype: str, seed: int = 0) -> layouts.Values:
    """Lists of tensors, as float64 values that their dtypes represent exactly, and what a gradient alone is told."""
    rng = np.random.default_rng([seed, len(case.sizes), sum(case.sizes), case.first])
    unit = 1.0 if dtype == "float16" else case.unit
    values: layouts.Values = dict.fromkeys(("student", "start", "target", "mask", "weights"))
    near = [unit * rng.standard_normal(n) for n in case.sizes]
    for name, apart in (("student", 0.7 * case.apart), ("start", case.apart), ("target", 0.0)):
        moved = (x + unit * apart * rng.standard_normal(x.shape) for x in near)
        values[name] = [layouts.rounded(x, dtype) for x in moved]
    if case.mask == "weights":
        values["weights"] = [float(t % 3) for t in range(1, len(case.sizes) + 1)]
    elif case.mask != "none":
        kept = [rng.random(n) < 0.6 for n in case.sizes]
        kept[0][0] = True
        weights = [np.ones(n) if case.mask == "bool" else layouts.rounded(rng.random(n), "float32") for n in case.sizes]
        values["mask"] = [np.where(keep, weight, 0.0) for keep, weight in zip(kept, weights, strict=True)]
    values["smallest"] = SMALLEST_NORMAL[dtype if case.wanted in ("gradient", "derivative") else "float32"]
    if dtype == "float64":
        values["smallest"] = SMALLEST_NORMAL[dtype]
    return values


def arrays(case: Case, values: layouts.Values, make: layouts.Make, dtype: str) -> dict[str, Any]:
    """The values as arrays of a framework."""
    sums = "float64" if dtype == "float64" else "float32"
    dtypes = {"mask": "bool" if case.mask == "bool" else sums}
    made = {
        name: None if values[name] is None else [make(x, dtypes.get(name, dtype), case.layout) for x in values[name]]
        for name in ("student", "start", "target", "mask")
    }
    return made | {"weights": values["weights"], "values": values, "make": make, "dtype": dtype, "sums": sums}


def known_totals(case: Case, values: layouts.Values) -> F64:
    """num, D, S and no wrong weight, as a gradient alone is told them."""
    totals = np.zeros(4)
    loss = np.zeros(())
    lists = (values[name] for name in ("student", "start", "target", "mask"))
    _dispatch.run("trajectory_match", "reference", *lists, None, loss, totals, None, values["weights"], case.first)
    return totals


def call(case: Case, made: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All that the room is called with, and its outputs among it, poisoned with NaN."""
    make, sums, student = made["make"], made["sums"], made["student"]
    alone = case.wanted in ("gradient", "derivative")
    loss = None if alone else make(np.full((), np.nan), sums, "contiguous")
    totals = make(known_totals(case, made["values"]) if alone else np.full(4, np.nan), "float64", "contiguous")
    gradient = [make(np.full(x.shape, np.nan), made["dtype"] if alone else sums, case.layout) for x in student]
    arguments = (
        student,
        None if alone else made["start"],
        None if case.wanted == "derivative" else made["target"],
        made["mask"],
        make(np.array(LOSS_GRADIENT), sums, "contiguous") if alone else None,
        loss,
        totals,
        None if case.wanted == "loss" else gradient,
        made["weights"],
        case.first,
    )
    outputs = {} if alone else {"loss": loss, "totals": totals}
    if case.wanted != "loss":
        outputs |= {f"gradient[{t}]": x for t, x in enumerate(gradient)}
    return arguments, outputs


def run(case: Case, made: dict[str, Any], backend: str) -> dict[str, Any]:
    """Runs the room itself, below the front door."""
    arguments, outputs = call(case, made)
    _dispatch.run("trajectory_match", backend, *arguments)
    return outputs


def scales(case: Case, values: layouts.Values) -> dict[str, F64]:
    """For every output, its own size: sums of squares do not cancel. Subnormal gradients round like the smallest normal."""
    expected = run(case, arrays(case, values, layouts.numpy_array, "float64"), "reference")
    return {
        name: np.abs(x) + (values["smallest"] if name.startswith("gradient") else 0) for name, x in expected.items()
    }


def bound(case: Case, dtype: str) -> dict[str, float]:
    """Relative error bounds by output.

    A difference is off by u, its square by 2u; sums of P non-negative terms in float64, with weight and product, by
    (3 sqrt(P) + 3) 2^-53 (Higham and Mary 2019, lambda = 3). The loss doubles that and rounds once. A gradient takes the
    error of D, and those of difference, weights, scale and two products; autograd's is then rounded to its dtype.
    """
    unit = layouts.UNIT["float64" if dtype == "float64" else "float32"]
    sums = 2 * unit + (3 * math.sqrt(sum(case.sizes)) + 3) * layouts.UNIT["float64"]
    alone = case.wanted in ("gradient", "derivative")
    gradient = 1.01 * (sums + 5 * unit + (layouts.UNIT[dtype] if alone else 0))
    by_name = {"loss": 1.01 * (2 * sums + unit), "totals": 1.01 * sums}
    return by_name | {f"gradient[{t}]": gradient for t in range(len(case.sizes))}
