"""Work spread over processes, whose results are those of one process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def threads_of(workers: int) -> int:
    """Threads that each worker computes with: those of this process, divided among them."""
    return max(1, torch.get_num_threads() // workers)


def spread(work: Callable[[T], R], items: Sequence[T], workers: int) -> list[R]:
    """Does work for every item, in the order of items; more than one worker are spawned processes of their own.

    They die with the process that started them, and when one of them fails.

    Args:
        work: Sent to each worker once, by value.
        items: What it is called with.
        workers: How many processes; 1 is this one.

    Raises:
        TypeError: As `sent`.
        RuntimeError: A worker died.
    """
    if min(workers, len(items)) < 2:
        return [work(item) for item in items]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    start = (theirs, sent(work), threads_of(workers))
    with theirs, ProcessPoolExecutor(min(workers, len(items)), context, _begin, start) as pool:
        try:
            results = [pool.submit(_do, item) for item in items]
            pool.submit(int)  # a submission has the pool watch the processes that earlier ones started, not its own
            for each in wait(results, return_when=FIRST_EXCEPTION).done:
                each.result()
            return [each.result() for each in results]
        except BrokenProcessPool as why:
            raise RuntimeError("workers: a process died before it was done; what it had written stays") from why
        finally:
            ours.close()  # what workers wait for: also where this process is killed, or one of them has failed


def sent(work: Any) -> bytes:
    """What a worker gets. Not left to multiprocessing, which puts tensors into shared memory, often too small.

    Raises:
        TypeError: It cannot be pickled.
    """
    try:
        return pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as why:
        wanted = "a make_model that can be pickled, such as functools.partial(ConvNet, 3, 10)"
        raise TypeError(f"workers: more than 1 needs {wanted}: {why}") from why


_work: Callable[[Any], Any]


def _begin(parent: Connection, told: bytes, threads: int) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    _work = pickle.loads(told)


def _end_with(parent: Connection) -> None:
    parent.poll(None)
    os._exit(1)


def _do(item: Any) -> Any:
    return _work(item)
