"""What the files of MATES cost beside the scorer: list, read, sample, score with a scorer that does nothing, check.

    python benchmarks/algorithms/mates/files.py --documents 1000000    # some minutes, 1 GB of disk

Every step runs in a process of its own. Seconds of CPU are those of all its processes; memory is the largest of one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from ghostgram.algorithms.mates.files.identity import logical_digest
from ghostgram.algorithms.mates.files.pool import Pool
from ghostgram.algorithms.mates.files.store import Stage
from ghostgram.algorithms.mates.scoring.score import score

SHARDS = 16
WORDS = 100  # on average in a document


class Free:
    """Scores a text by its length: all that is measured is the way there and back."""

    references = ("reference",)
    digest = "free"

    def score(self, texts: list[str]) -> np.ndarray:
        return np.array([[len(text) / 1000 - 2] for text in texts], np.float32)

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "free").touch()


def load(folder: Path) -> Free:
    return Free()


def write(folder: Path, documents: int, kind: str) -> None:
    """A pool of random words."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    words = np.array(
        ["".join(chr(97 + c) for c in chance.integers(0, 26, chance.integers(2, 9))) for _ in range(20000)]
    )
    for shard in range(SHARDS):
        rows = []
        for _ in range(documents // SHARDS):
            drawn = chance.integers(0, len(words), chance.integers(1, 2 * WORDS))
            rows.append(
                {"text": " ".join(words[drawn].tolist()), "source": f"source {len(drawn) % 7}", "n": len(drawn)}
            )
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:03d}.parquet", compression="zstd")
        else:
            with gzip.open(folder / f"{shard:03d}.jsonl.gz", "wt", compresslevel=1) as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def pool_in(folder: Path) -> Pool:
    return Pool(f"{folder}/*", domain="source", n_tokens="n")


def listed(folder: Path) -> None:
    pool_in(folder)


def read(folder: Path) -> None:
    pool = pool_in(folder)
    for shard in pool.shards:
        for _ in pool.documents(shard):
            pass


def sampled(folder: Path) -> None:
    pool_in(folder).sample(10_000)


def scored(folder: Path) -> None:
    score(pool_in(folder), Free(), folder.parent / "run", load, workers=2)


def checked(folder: Path) -> None:
    (kept,) = (folder.parent / "run" / "stage-1" / "score").iterdir()
    Stage(folder.parent / "run", 1, "score", kept.name).require()


def digested(folder: Path) -> None:
    (kept,) = (folder.parent / "run" / "stage-1" / "score").iterdir()
    for part in kept.glob("*.parquet"):
        logical_digest(pq.read_table(part))


STEPS: dict[str, Callable[[Path], None]] = {
    "list (digests of shards)": listed, "list and read": read, "list, read, sample 10,000": sampled,
    "list, read, score, commit": scored, "check a complete stage": checked, "logical digest of the scores": digested,
}  # fmt: skip


def measured(step: str, folder: Path) -> tuple[float, float, float]:
    """Wall and CPU seconds, and MiB of the largest process."""
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF)
    STEPS[step](folder)
    wall = time.perf_counter() - start
    mine, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = mine.ru_utime + mine.ru_stime - before.ru_utime - before.ru_stime + children.ru_utime + children.ru_stime
    return wall, cpu, max(mine.ru_maxrss, children.ru_maxrss) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    arguments = parser.parse_args()
    columns: list[Any] = ["pool", "step", "wall s", "CPU s", "microseconds of CPU a document", "MiB"]
    table = Table(*columns, title=f"{arguments.documents:,} documents, {SHARDS} shards")
    for kind in ("parquet", "jsonl.gz"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "pool")
            write(folder, arguments.documents, kind)
            size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
            for step in STEPS:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    wall, cpu, most = process.submit(measured, step, folder).result()
                each = f"{cpu / arguments.documents * 1e6:.2f}"
                table.add_row(f"{kind}, {size:.0f} MiB", step, f"{wall:.1f}", f"{cpu:.1f}", each, f"{most:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
