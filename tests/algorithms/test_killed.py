"""A run killed in the middle (SIGKILL) and resumed from its checkpoint logs every sample of every step exactly once."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from algorithms import killed

TESTS = Path(__file__).parent.parent


def finish(folder, ranks, most):
    """Starts all ranks again and again, killing them at random moments, until they are through; counts the kills."""
    folder.mkdir()
    chance, kills = random.Random(ranks), 0
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    while True:
        arguments = [str(ranks), str(folder / f"meeting-{kills}")]
        started = [
            subprocess.Popen(
                [sys.executable, killed.__file__, str(folder), str(rank), *arguments],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        try:
            said = [process.stdout.readline() for process in started]
            assert said == ["going\n"] * ranks, [process.communicate()[1] for process in started]
            if kills < most:
                time.sleep(chance.uniform(0.02, 0.25))
                for process in chance.sample(started, ranks):  # one after another: the rest meets a dead rank
                    process.kill()
                    time.sleep(chance.uniform(0, 0.02))
            errors = [process.communicate(timeout=60)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        if all(process.returncode == 0 for process in started):
            return kills
        assert kills < most, errors
        kills += 1


def table(folder):
    parts = sorted(folder.rglob("*.parquet"))
    found = pa.concat_tables([pq.read_table(part, partitioning=None) for part in parts])
    return found.sort_by([(c, "ascending") for c in ("step", "sample_id") if c in found.column_names])


@pytest.mark.parametrize("ranks", [1, 2])
def test_run_killed_and_resumed_has_the_log_of_one_that_was_not(tmp_path, ranks):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finish(broken, ranks, most=4) >= 2  # else the kills came too late to test anything
    finish(whole, ranks, most=0)  # in a process like the other's: MKL rounds differently in one that pytest fills
    steps = table(broken / "log" / "steps")
    each = killed.ROWS * ranks
    assert steps["step"].to_pylist() == [step for step in range(killed.STEPS) for _ in range(each)]
    assert steps["sample_id"].to_pylist() == list(range(killed.STEPS * each))
    assert steps.equals(table(whole / "log" / "steps"))  # to the bit
    assert table(broken / "log" / "ledger").equals(table(whole / "log" / "ledger"))
