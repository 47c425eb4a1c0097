"""The Ray engine: a Ray Data dataset of descriptions of units, whose actors read, compute and commit."""

from __future__ import annotations

import math
import os
import pickle
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import ray.data

from ghostgram.algorithms.mates.files.store import Stage
from ghostgram.algorithms.mates.scoring.engine import TRIES, EngineError, Resources, Work


def run(
    stage: Stage, units: Mapping[str, Any], make_work: Callable[[], Work], inputs: Mapping[str, str], use: Resources
) -> Generator[str]:
    """Yields the name of every unit that is done; rows of the dataset hold names and descriptions, never results.

    Ray repeats the work of an actor that died without end, so a count outside the actors ends it.
    """
    rows = [{"unit": name, "described": pickle.dumps(unit)} for name, unit in units.items()]
    tries = ray.remote(num_cpus=0)(_Tries).remote()
    with _quiet():
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(make_work, tries, use.gpus > 0),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=use.workers),  # as many as the cluster has room for
            num_cpus=1,
            num_gpus=1 / math.ceil(use.workers / use.gpus) if use.gpus else 0,
        )
        try:
            for row in done.iter_rows():
                yield row["unit"]
        except ray.exceptions.RayError as why:
            raise EngineError(f"a unit of {stage.folder} failed: {why}") from why


class _Tries:
    """Counts how often each unit was begun."""

    def __init__(self) -> None:
        self._begun = Counter[str]()

    def begin(self, unit: str) -> int:
        self._begun[unit] += 1
        return self._begun[unit]


class _Actor:
    """A worker: made once in each process, called for each unit."""

    def __init__(self, make_work: Callable[[], Work], tries: Any, sees_gpu: bool) -> None:
        if not sees_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # which Ray leaves alone for an actor without GPUs
        self._work, self._tries = make_work(), tries

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (name,), (described,) = batch["unit"], batch["described"]
        if ray.get(self._tries.begin.remote(name)) > TRIES:
            raise EngineError(f"unit {name}: its process died {TRIES} times")
        self._work(name, pickle.loads(described))
        return {"unit": [name]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray's own progress bars: ours counts commits."""
    context = ray.data.DataContext.get_current()
    before, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        yield
    finally:
        context.enable_progress_bars = before
