"""Experts recorded by processes that are killed, at every moment that counts or at any moment.

As a script: storm.py every FOLDER kills a process at each of the moments around every write, in FOLDER/<moment>, and
finishes there; prints how many moments there are. storm.py any FOLDER KILLS lets two processes share FOLDER,
each killed at random moments and replaced; prints how many died. storm.py workers FOLDER OPTIONS is a run of two
workers.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import torch

from algorithms.forks import by_turns, ended, forked
from algorithms.pad import tiny
from ghostgram.algorithms.pad.experts import recorder


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment):
    """From now on this process dies at the moment of this number; they lie before and after all that changes files."""
    left = [moment]

    def passes():
        left[0] -= 1
        return left[0] < 0

    def around(place, name):
        real = getattr(place, name)

        def call(*arguments, **named):
            if passes():
                die()
            result = real(*arguments, **named)
            if passes():
                die()
            return result

        setattr(place, name, call)

    def torn(file, real=recorder._to_disk):
        if passes():  # with the end of what was written lost
            file.flush()
            if file.name.endswith(recorder.LOG):
                os.ftruncate(file.fileno(), max(0, os.fstat(file.fileno()).st_size - 20))
            elif file.tell():
                os.pwrite(file.fileno(), bytes(20), file.tell() - 20)
            die()
        real(file)

    recorder._to_disk = torn
    for place, name in ((Path, "mkdir"), (Path, "replace"), (Path, "unlink")):
        around(place, name)


def every(folder):
    for moment in itertools.count():

        def deadly(moment=moment):
            die_at(moment)
            tiny.recorded(folder / str(moment), **tiny.SHORT)

        if (status := ended(forked(deadly))) == 0:
            return moment
        assert status == signal.SIGKILL, status
        tiny.recorded(folder / str(moment), **tiny.SHORT)


if __name__ == "__main__":
    torch.set_num_threads(1)
    how, folder = sys.argv[1], Path(sys.argv[2])
    if how == "workers":
        tiny.recorded(folder, **json.loads(sys.argv[3]), workers=2)
    else:
        print(
            every(folder) if how == "every" else by_turns(lambda: tiny.recorded(folder), 2, int(sys.argv[3]), (0, 0.05))
        )
