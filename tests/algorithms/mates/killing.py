"""Processes that kill themselves (SIGKILL) at a named point of writing a part or a commit.

As a script: killing.py FOLDER commits two units in FOLDER/<point>/<file> for every point and file, in a process of its
own that does not survive the second one; prints how each ended.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet  # before forks, each of which would have to import it

from algorithms.forks import ended, forked
from ghostgram import _files
from ghostgram.algorithms.mates.files.places import Place
from ghostgram.algorithms.mates.files.store import Stage

POINTS = ["before tmp", "mid-write", "after fsync", "after rename", "after commit"]
ENDS = {"part": ".parquet", "commit": ".json"}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(point, file, due=lambda: True):
    """From now on this process dies at `point` of the next `file` ("part" or "commit") it writes, when `due()`."""

    def meant(path):
        name = Path(path).name.lstrip(".")
        return ENDS[file] in name and not name.startswith("manifest") and due()

    def patched(place, name, before=None, after=None, which=0):
        real = getattr(place, name)

        def call(*arguments, **named):
            here = meant(named["prefix"] if name == "mkstemp" else arguments[which])
            if here and before:
                before(*arguments)
            result = real(*arguments, **named)
            if here and after:
                after()
            return result

        setattr(place, name, call)

    def tear(path, data):
        with open(path, "wb") as half:
            half.write(data[: len(data) // 2])
        die()

    if point == "before tmp":
        patched(_files.tempfile, "mkstemp", before=lambda *_: die())
    elif point == "mid-write":
        patched(Path, "write_bytes", before=tear)
    elif point == "after fsync":
        patched(_files, "_to_disk", after=die)
    elif point == "after rename":
        patched(Path, "replace", after=die, which=1)
    else:
        patched(Place, "write", after=die, which=1)


def rows(n, seed):
    chance = np.random.default_rng(seed)
    ids = pa.array([chance.bytes(16) for _ in range(n)], pa.binary(16))
    return pa.table({"doc_id": ids, "domain": pa.array(chance.choice(["a", None], n), pa.string()),
                     "z": pa.array(chance.standard_normal(n), pa.float32())})  # fmt: skip


def commit_and_die(run, point, file):
    stage = Stage(run, 1, "score", "abc")
    stage.commit("0", rows(10, 0))
    kill_at(point, file)
    stage.commit("1", rows(50, 1))


if __name__ == "__main__":
    for point in POINTS:
        for file in ENDS:
            print(ended(forked(partial(commit_and_die, Path(sys.argv[1], point, file), point, file))), flush=True)
