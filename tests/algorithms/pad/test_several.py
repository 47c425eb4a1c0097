"""Work that fails in one process ends at once in all of them, and says why."""

import time
from functools import partial

import pytest

from algorithms.pad import tiny
from ghostgram.algorithms.pad.several import spread


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [("fail", ValueError, "item 1 is wrong"), ("die", RuntimeError, "workers: a process died before it was done")],
)
def test_one_failure_ends_all(what, error, message):
    started = time.monotonic()
    with pytest.raises(error, match=message):
        spread(partial(tiny.sleep_or, what), [0, 1], 2)
    assert time.monotonic() - started < 200  # not the 300 s of the other item


def test_one_worker_is_this_process():
    seen = []
    assert spread(lambda item: seen.append(item) or 2 * item, [3, 1], 1) == [6, 2]
    assert seen == [3, 1]
    assert spread(lambda item: seen.append(item), [], 4) == []
