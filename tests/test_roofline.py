"""The roofs: measured in the right units, and the percentage taken of the one that binds."""

import pytest

from ghostgram.testing import roofline
from ghostgram.testing.roofline import Roofs, percent_of_roof

ROOFS = Roofs(flops=100.0, read=20.0, copy=10.0, triad=15.0)


@pytest.mark.parametrize(
    ("flops", "moved", "percent"),
    [(100, 0, 50), (100, 20, 50), (100, 40, 100), (0, 10, 25)],
    ids=["only flops", "both at the ridge", "memory binds", "only memory"],
)
def test_the_higher_roof_binds(flops, moved, percent):
    assert percent_of_roof(flops, moved, 2.0, ROOFS) == pytest.approx(percent)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_measured_rates_are_per_second(dtype):
    roofs = roofline.measure(0.02, dtype, 8 << 20)
    assert 1e8 < roofs.flops < 1e14
    assert all(1e8 < rate < 1e13 for rate in (roofs.read, roofs.copy, roofs.triad))
