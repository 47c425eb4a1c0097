"""Per-sample gradient statistics of a whole model beside the packages that give them, interleaved in one process."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
from peers import memory
from peers.methods import (
    PLAIN,
    TASKS,
    VOCABULARY,
    Method,
    Model,
    copied,
    exact_grams,
    expected,
    relative_error,
)
from peers.table import page
from recording import RESULTS, device_stem, save
from torch import Tensor, nn

OURS = "ghostgram"
ROUND_TOKENS = 6144  # three rounds of short batches; one of long ones, where a single call takes a quarter of a minute


@lru_cache(maxsize=1)
def setting(samples: int, context: int) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    """The model, ids (B, T + 1), one validation sequence, and the exact values; the same for all tasks of a size."""
    torch.manual_seed(0)
    model = Model(context)
    ids, validation = torch.randint(VOCABULARY, (samples + 1, context + 1)).split([samples, 1])
    return model, ids, validation, exact_grams(model, ids, validation)


@pytest.fixture(scope="module")
def record_rows() -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Rows go to the JSON, where they replace those of the same size and task, and from there into the table."""
    rows: list[dict[str, Any]] = []
    yield rows.extend
    measured = {(row["size"], row["task"]) for row in rows}
    entry = save("peers", rows, keep=lambda row: (row["size"], row["task"]) not in measured)
    (RESULTS / f"peers-{device_stem()}.md").write_text(page(entry))


class Runner:
    """Methods by name, each on a model of its own, with the seconds and peaks of their calls."""

    def __init__(self, methods: list[Method], model: nn.Module, ids: Tensor, validation: Tensor, say: Callable) -> None:
        self.ids, self.say = ids, say
        self.steps: dict[str, Callable[[Tensor], Any]] = {}
        self.models: dict[str, nn.Module] = {}
        self.absent: dict[str, str] = {}
        self.seconds, self.peaks = defaultdict(list), defaultdict(list)
        self.results: dict[str, Any] = {}
        for method in methods:
            own = copied(model)
            try:
                version(method.package)
                step = method.build(own, validation)
                step(ids[:1])  # what a first call does once, at little cost
            except PackageNotFoundError:
                self.absent[method.name] = f"{method.package} is not installed"
            except Exception as why:  # a peer that fails is named, with its own words
                self.absent[method.name] = f"it raised {type(why).__name__}: {str(why).splitlines()[0][:200]}"
            else:
                self.steps[method.name], self.models[method.name] = step, own
        for name, why in self.absent.items():
            say(f"absent: {name}, because {why}")

    def call(self, name: str) -> None:
        for parameter in self.models[name].parameters():
            parameter.grad = None
        resident = memory.start()
        started = time.perf_counter()
        self.results[name] = self.steps[name](self.ids)
        self.seconds[name].append(time.perf_counter() - started)
        self.peaks[name].append(memory.peak_since(resident))
        self.say(f"{name} {self.seconds[name][-1]:.1f} s")

    def row(self, method: Method, task: str, names: list[str], grams: dict[str, Tensor]) -> dict[str, Any]:
        median = {name: statistics.median(times) for name, times in self.seconds.items()}
        seconds = median[method.name] + sum(median[name] for name in method.beside)
        result, covered = self.results[method.name], method.covered(self.models[method.name])
        missed = [name for name in names if name not in covered]
        by_kind = f"{len(missed)} of {len(names)} parameters" if missed else ""
        has_result = isinstance(result, Tensor)
        return {
            "seconds": seconds,
            "ratio": seconds / median[PLAIN.name],
            "rounds": len(self.seconds[method.name]),
            "peak_mib": self.peaks[method.name][0],  # later rounds find workspaces that the first one had to grow
            "error": relative_error(result, expected(method, task, grams, covered)) if has_result else None,
            "missed": by_kind,
            "error_of_whole": relative_error(result, expected(method, task, grams, names)) if has_result else None,
        }


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("context", [256, 512], ids="T{}".format)
@pytest.mark.parametrize("samples", [8, 16], ids="B{}".format)
def bench_peers(benchmark, record_rows, capsys, samples, context, task):
    def say(line: str) -> None:
        with capsys.disabled():
            print(f"  B{samples} T{context} {task}: {line}", flush=True)

    say("exact values, one sample at a time")
    model, ids, validation, grams = setting(samples, context)
    names = [name for name, _ in model.named_parameters()]
    methods = [PLAIN, *TASKS[task]]
    runner = Runner(methods, model, ids, validation, say)

    def the_others() -> None:
        for name in runner.steps:
            if name != OURS:
                runner.call(name)

    rounds = max(1, ROUND_TOKENS // (samples * context))
    benchmark.pedantic(lambda: runner.call(OURS), setup=the_others, rounds=rounds)
    rows = []
    for method in methods:
        row = {"size": f"B{samples} T{context}", "task": task, "method": method.name, "does": method.does}
        row["version"] = None if method.name in runner.absent or method.package == "torch" else version(method.package)
        if method.name in runner.absent:
            row["absent"] = runner.absent[method.name]
        else:
            row |= runner.row(method, task, names, grams)
        rows.append(row)
    record_rows(rows)
    ours = next(row for row in rows if row["method"] == OURS)
    assert ours["error"] < 1e-4, ours
