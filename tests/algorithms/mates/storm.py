"""Three processes score the same pool without an engine, each killed at random moments and replaced.

As a script: storm.py POOL RUN KILLS; prints how many were killed in the middle of their work.
"""

import os
import random
import sys
from pathlib import Path

import pyarrow.compute  # before forks, each of which would have to import it
import pyarrow.parquet  # noqa: F401

from algorithms.forks import by_turns
from algorithms.mates import tiny
from ghostgram.algorithms.mates.files.pool import Pool
from ghostgram.algorithms.mates.scoring import score as scoring

WORKERS = 3


def here(stage, units, make, *, inputs, **named):
    """In place of an engine: does what is left in this process, in an order of its own."""
    work, names = make(), list(units)
    random.Random(os.getpid()).shuffle(names)
    for name in names:
        if name not in stage.committed(inputs):
            work(name, units[name])
    return stage.committed(inputs)


def share(pool, run):
    scoring.run_units = here
    scoring.Stage.complete = lambda *_, **named: None  # by the parent alone, when nobody commits any more
    scoring.score(pool, tiny.Tiny(nap=0.001), run, tiny.load)


if __name__ == "__main__":
    folder, run, most = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    pool = Pool(f"{folder}/*.jsonl", domain="source", n_tokens="n")
    kills = by_turns(lambda: share(pool, run), WORKERS, most, (0, 0.03))
    scoring.run_units = here
    scoring.score(pool, tiny.Tiny(nap=0.001), run, tiny.load)
    print(kills)
