"""Runs units of work in processes of their own; what they did is known from their commits alone.

Nothing is returned through an engine, so one engine cannot give another result than another one, and a run that was
killed is resumed by running it again.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ghostgram.algorithms.mates.files.store import Commit, Stage

TRIES = 3
"""So often may a unit's process die before the run is given up."""

Work = Callable[[str, Any], None]
"""Does a unit, given its name and what describes it, and commits it."""


class EngineError(RuntimeError):
    """A unit failed, or its process died again and again; the message names the unit. Committed units stay done."""


@dataclass(frozen=True)
class Resources:
    """What an engine may use.

    Args:
        workers: How many processes.
        gpus: How many GPUs they share, each worker one of them; at most `workers`. At 0 they see none.
    """

    workers: int
    gpus: int


def run_units(
    stage: Stage,
    units: Mapping[str, Any],
    make_work: Callable[[], Work],
    *,
    inputs: Mapping[str, str],
    engine: str = "local",
    workers: int | None = None,
    gpus: int = 0,
) -> dict[str, Commit]:
    """Does all units that are not committed yet.

    A unit that raises ends the run, for it would raise again. A unit whose process dies is done again, up to three
    times in all. Either way everything committed before stays. On a terminal a bar counts the commits.

    Args:
        stage: Where units are committed.
        units: What describes each unit, by name; pickled into the processes.
        make_work: Called once in each process; what it returns is called for each unit there. Pickled.
        inputs: Digest of what each unit is made from: a commit that was made from something else does not count.
        engine: "local": processes of this machine, spawned, so a script that gets here has to be guarded by
            `if __name__ == "__main__"`. "ray": actors of the Ray cluster this process is connected to, or else of one
            that Ray starts here.
        workers: How many processes; by default one for each GPU, or for each CPU where `gpus` is 0. Each computes with
            one thread, unless OMP_NUM_THREADS says otherwise: with more the bits could depend on their number.
        gpus: How many GPUs they share; at 0 they see none.

    Returns:
        The commit of every unit, sorted by name.

    Raises:
        EngineError: A unit failed, its process died three times, or it returned without a commit.
        ValueError: `engine`, `workers` or `gpus` is out of its range.
        ImportError: Ray is missing.
    """
    if engine not in ("local", "ray"):
        raise ValueError(f'engine: expected "local" or "ray", got {engine!r}')
    if gpus < 0 or (workers is not None and workers < 1):
        raise ValueError(f"workers, gpus: expected at least 1 and 0, got {workers} and {gpus}")
    if engine == "ray":
        if importlib.util.find_spec("ray") is None:
            raise ImportError("engine='ray' needs Ray: pip install 'ghostgram[ray]'")
        from ghostgram.algorithms.mates.scoring.engine_ray import run
    else:
        run = _run
    done = stage.committed(inputs)
    left = {name: unit for name, unit in units.items() if name not in done}
    if left:
        count = min(len(left), workers or gpus or len(os.sched_getaffinity(0)))
        running = run(stage, left, make_work, inputs, Resources(count, min(gpus, count)))
        with closing(running), _bar(stage, len(units), len(done)) as advance:  # closed, it ends its processes
            for name in running:
                if not stage.has(name, inputs[name]):
                    raise EngineError(f"unit {name}: returned without a commit that holds in {stage.folder}")
                advance()
        done = stage.committed(inputs)
    return done


@dataclass
class _Hand:
    """A worker process: its end of the pipe, its place among the GPUs, and the unit it is at."""

    process: BaseProcess
    pipe: Connection
    place: int
    unit: str | None = None


def _run(
    stage: Stage, units: Mapping[str, Any], make_work: Callable[[], Work], inputs: Mapping[str, str], use: Resources
) -> Generator[str]:
    """The local engine: yields the name of every unit that is done.

    Every worker has a pipe of its own and no lock is shared, so one that dies at any moment blocks no other; its end of
    the pipe closes with it, which is how its death is seen.
    """
    queue, deaths = deque(units), Counter[str]()
    hands: dict[Connection, _Hand] = {}
    try:
        while queue or any(hand.unit for hand in hands.values()):
            wanted = len(queue) - sum(hand.unit is None for hand in hands.values())
            free = sorted({*range(use.workers)} - {hand.place for hand in hands.values()})
            for place in free[: max(0, wanted)]:
                hand = _start(make_work, place, use.gpus)
                hands[hand.pipe] = hand
            for hand in hands.values():
                if hand.unit is None and queue:
                    hand.unit = queue.popleft()
                    with suppress(OSError):  # it has died; reading from the pipe will say so
                        hand.pipe.send((hand.unit, units[hand.unit]))
            for pipe in wait([pipe for pipe, hand in hands.items() if hand.unit]):
                assert isinstance(pipe, Connection)
                hand = hands[pipe]
                unit, hand.unit = str(hand.unit), None
                try:
                    if failed := pipe.recv():
                        raise EngineError(f"unit {unit}: {failed}")
                except (EOFError, OSError):
                    code = _bury(hands.pop(pipe))
                    if not stage.has(unit, inputs[unit]):
                        deaths[unit] += 1
                        if deaths[unit] == TRIES:
                            died = f"its process died {TRIES} times, the last one with exit code {code}"
                            raise EngineError(f"unit {unit}: {died}") from None
                        queue.append(unit)
                        continue
                yield unit
    finally:
        for hand in hands.values():
            hand.process.kill()  # which a worker may be at any moment, by us too
            _bury(hand)


def _bury(hand: _Hand) -> int | None:
    """Clears away a process that is dying; its exit code."""
    hand.process.join()
    hand.pipe.close()
    return hand.process.exitcode


def _start(make_work: Callable[[], Work], place: int, gpus: int) -> _Hand:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make_work), daemon=True)
    with _environment(place, gpus):
        process.start()
    theirs.close()
    return _Hand(process, ours, place)


def _serve(pipe: Connection, make_work: Callable[[], Work]) -> None:
    """What a worker does until its pipe closes, be it that the parent is done or dead."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    work: Work | None = None
    while True:
        try:
            name, unit = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            work = work or make_work()
            work(name, unit)
            pipe.send(None)
        except Exception as why:
            pipe.send(f"{why}\n\n{traceback.format_exc()}")


@contextmanager
def _environment(place: int, gpus: int) -> Iterator[None]:
    """What a worker finds in its environment from its first moment on, when libraries read it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(device) for device in range(gpus)]
    chosen = {"CUDA_VISIBLE_DEVICES": devices[place % gpus] if gpus else "",
              "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # fmt: skip
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _bar(stage: Stage, total: int, done: int) -> Iterator[Callable[[], None]]:
    """A bar on the terminal, where there is one; gives what moves it on by one commit."""
    if importlib.util.find_spec("rich") is None:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"stage {stage.number}: {stage.kind}", total=total, completed=done)
        yield lambda: progress.advance(task)
