"""Work in forked processes, killed at moments that are not the program's: for scripts, not for pytest's own process."""

import os
import random
import signal
import time


def forked(work):
    """A process that does the work and ends well, or not."""
    if child := os.fork():
        return child
    work()
    os._exit(0)


def ended(child):
    """How it ended, once it has: 0 if well."""
    return os.waitpid(child, 0)[1]


def until_done(work, kills, nap, seed):
    """One process after another does the work, the first of them killed `kills` times; how many died of it."""
    chance, killed = random.Random(seed), 0
    while True:
        child = forked(work)
        if killed < kills:
            time.sleep(chance.uniform(*nap))
            os.kill(child, signal.SIGKILL)
        if (status := ended(child)) == 0:
            return killed
        assert status == signal.SIGKILL, status
        killed += 1


def by_turns(work, workers, kills, nap):
    """Several processes share the work, and whichever is killed is replaced; how many died in the middle of it."""
    chance, killed = random.Random(1), 0
    running = [forked(work) for _ in range(workers)]
    while killed < kills:
        time.sleep(chance.uniform(*nap))
        at = chance.randrange(workers)
        os.kill(running[at], signal.SIGKILL)
        killed += ended(running[at]) == signal.SIGKILL
        running[at] = forked(work)
    assert [ended(each) for each in running] == [0] * workers
    return killed
