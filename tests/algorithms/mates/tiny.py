"""A scorer whose every bit depends on the text, on its batch and on what was saved; and work that dies or fails.

As a script: tiny.py POOL RUN WORKERS scores the pool slowly by the local engine, after saying "going"; it says each
worker's process number.
"""

import json
import os
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from algorithms.mates.killing import die, kill_at
from ghostgram.algorithms.mates.files.pool import Pool
from ghostgram.algorithms.mates.scoring import score as scoring

REFERENCES = ("lambada", "code")


@dataclass(frozen=True)
class Tiny:
    salt: int = 1
    nap: float = 0.0  # in every batch, in seconds
    references = REFERENCES

    @property
    def digest(self):
        return f"tiny-{self.salt}"

    def score(self, texts):
        time.sleep(self.nap)
        longest = max(map(len, texts))
        hashes = [[zlib.crc32(f"{name}{self.salt}{text}".encode()) for name in REFERENCES] for text in texts]
        return (np.array(hashes) / 2.0**30 - 2 + longest / 1000).astype(np.float32)

    def save(self, folder):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "tiny.json").write_text(json.dumps([self.salt, self.nap]))


def load(folder):
    return Tiny(*json.loads((folder / "deep" / "tiny.json").read_text()))


@dataclass(frozen=True)
class NotFinite(Tiny):
    """Gives no score to texts that begin with x."""

    def score(self, texts):
        z = super().score(texts)
        z[[text.startswith("x") for text in texts], 1] = np.nan
        return z


def load_not_finite(folder):
    return NotFinite(load(folder).salt)


def make_commit(stage, table, input):
    """Work that commits one table for every unit."""
    return lambda unit, described: stage.commit(unit, table, {"described": described}, input=input)


def once(folder, name):
    """Whether this is the first call with that name, of all processes."""
    try:
        os.close(os.open(Path(folder, name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def make_deadly(make, folder, points):
    """The work of `make()`, but the first process to do a unit of `points` dies there: (point, file) by unit."""
    work = make()
    doing = [""]
    for unit, (point, file) in points.items():
        kill_at(point, file, lambda unit=unit: doing[0] == unit and once(folder, unit))

    def deadly(unit, described):
        doing[0] = unit
        work(unit, described)

    return deadly


def make_poisoned(folder):
    def work(unit, described):
        once(folder, f"{unit}-{os.getpid()}")
        if unit == "poison":
            die()

    return work


def make_failing():
    def work(unit, described):
        if unit == "wrong":
            raise ValueError(f"{described} is wrong")

    return work


def announce(folder):
    os.write(1, b"%d\n" % os.getpid())  # in one piece: three processes write
    return load(folder)


if __name__ == "__main__":
    pool, run, workers = sys.argv[1:]
    print("going", flush=True)
    scoring.score(Pool(f"{pool}/*.jsonl", domain="source", n_tokens="n"), Tiny(nap=0.004), run, announce,
                  workers=int(workers))  # fmt: skip
