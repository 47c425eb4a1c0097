"""Sums of scores are exact, in whatever order."""

import numpy as np
import pytest

from ghostgram.algorithms.mates.sums import ExactSums, add_by_group


def test_sums_do_not_depend_on_order_and_are_right():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.standard_normal(50_000), [4e6, -4e6, 2.0**22 - 1, -0.0]])
    whole, groups = ExactSums(), [ExactSums() for _ in range(5)]
    whole.add(scores)
    order = rng.permutation(len(scores))
    add_by_group(groups, scores[order], rng.integers(0, 5, len(scores)).astype(np.int32))
    merged = ExactSums()
    for part in groups[::-1]:
        merged.merge(part)
    q = [int(x) for x in np.rint(scores * 2**20)]
    assert (whole.n, whole.total, whole.squares) == (len(q), sum(q), sum(x * x for x in q))
    assert merged == whole
    assert merged.mean == pytest.approx(scores.mean(), abs=2**-21)
    assert merged.std == pytest.approx(scores.std(), rel=1e-6)
    for wrong in (2.0**22, np.nan):
        with pytest.raises(ValueError, match="scores: expected finite numbers below 4194304"):
            whole.add(np.array([0.0, wrong]))
