"""Selection from ten million scored documents beside reading their files alone: time, documents a second, peak memory.

Each way runs in a process of its own, so that its peak of memory is its own. Files are in the page cache.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghostgram.algorithms.mates.selection.ledger import Ledger
from ghostgram.algorithms.mates.selection.plan import Plan
from ghostgram.algorithms.mates.selection.select import select

DOCUMENTS, SHARDS = 10**7, 64
DOMAINS = ("books", "code", "papers", "web", "wiki")

TIMED = """
import json, sys, time
from pathlib import Path
import pyarrow.parquet as pq
from ghostgram.algorithms.mates.selection.ledger import Ledger
from ghostgram.algorithms.mates.selection.select import select

def of_process(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])

def read():
    for path in paths:
        with pq.ParquetFile(path) as file:
            for _ in file.iter_batches(2**18):
                pass

folder, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
paths = sorted(folder.glob("*.parquet"))
select([pq.read_table(paths[0]).slice(0, 1000)], docs=10)  # imports and threads
before, started, used = of_process("VmRSS"), time.perf_counter(), time.process_time()
if options is None:
    read()
else:
    ledger = Ledger(folder / "ledger") if options.pop("ledger", False) else None
    plan = select(paths, ledger=ledger, **options)
seconds, used, peak = time.perf_counter() - started, time.process_time() - used, of_process("VmHWM")
if options is not None:
    plan.write(out)
print(json.dumps({"seconds": seconds, "cpu_seconds": used, "peak": peak - before}))
"""

WAYS = {
    "docs 1e6": {"docs": 10**6},
    "ratio 0.2": {"ratio": 0.2},
    "tokens 1e9": {"tokens": 10**9},
    "ratio 0.2, mates_release": {"ratio": 0.2, "noise": "mates_release", "standardise": "none", "temperature": 0.5},
    "tokens 1e9, quotas": {"tokens": 10**9, "quotas": {"wiki": 0.2, "code": [0.2, 0.4]}},
    "docs 1e6, one of each cluster": {"docs": 10**6, "one_per": "cluster_id"},
    "docs 1e6, 2e6 spent": {"docs": 10**6, "ledger": True, "stage": 1},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Ten million documents as the score stage writes them, lengths going with scores, some of them in every shard."""
    folder = tmp_path_factory.mktemp("scores")
    again = []  # documents of the first shard that every later one holds too
    for number in range(SHARDS):
        rng = np.random.default_rng(number)
        n = DOCUMENTS // SHARDS
        ids = np.frombuffer(hashlib.shake_128(b"%d" % number).digest(16 * n), np.uint8).reshape(n, 16).copy()
        z = rng.standard_normal(n, dtype=np.float32)
        tokens = np.clip(np.exp(rng.normal(6.5 + 0.2 * z, 0.9)), 8, 8192).astype(np.int32)
        codes = rng.choice(len(DOMAINS), n, p=[0.1, 0.15, 0.05, 0.65, 0.05]).astype(np.int32)
        columns = {
            "doc_id": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), n, [None, pa.py_buffer(ids)]),
            "n_tokens": pa.array(tokens),
            "domain": pa.DictionaryArray.from_arrays(codes, list(DOMAINS)).cast(pa.string()),
            "cluster_id": pa.array(rng.integers(0, DOCUMENTS, n)),
            "z_reference": pa.array(z),
        }
        table = pa.table(columns)
        whole = pa.concat_tables([table, *again])
        again = again or [table.slice(0, n // 100)]
        pq.write_table(whole, folder / f"part-{number:06d}.parquet", compression="zstd")
    return folder


@pytest.fixture(scope="module")
def spent(shards):
    """A ledger of two million documents that were trained on."""
    plan = select(sorted(shards.glob("*.parquet")), docs=2 * 10**6)
    ledger = Ledger(shards / "ledger")
    ledger.plan(plan, 0)
    ledger.consume(0, len(plan))


def timed(shards: Path, out: Path, options: dict | None, rounds: int = 2) -> dict[str, float]:
    """The least that processes of their own took."""
    call = [sys.executable, "-c", TIMED, str(shards), str(out), json.dumps(options)]
    runs = [json.loads(subprocess.run(call, stdout=subprocess.PIPE, check=True).stdout) for _ in range(rounds)]
    return {name: min(run[name] for run in runs) for name in runs[0]}


@pytest.fixture(scope="module")
def reading(shards):
    """What reading every column once takes."""
    return timed(shards, shards, None)


@pytest.mark.parametrize("way", WAYS)
def bench_ten_million(benchmark, record, shards, spent, reading, tmp_path, way):
    small = [pq.read_table(path).slice(0, 500) for path in sorted(shards.glob("*.parquet"))[:7]]
    options = {name: value for name, value in WAYS[way].items() if name not in ("tokens", "docs", "ratio", "ledger")}
    plans = [select(order, docs=99, **options).table.drop_columns("shard") for order in (small, small[::-1])]
    assert plans[0].equals(plans[1])

    ours = benchmark.pedantic(lambda: timed(shards, tmp_path / "plan", WAYS[way]), rounds=1)
    plan = Plan.read(tmp_path / "plan")
    record(
        way=way,
        documents=DOCUMENTS,
        chosen=len(plan),
        tokens=plan.tokens,
        repeats=plan.report["repeats"],
        mean_z=plan.report["mean_z"],
        seconds=ours["seconds"],
        cpu_seconds=ours["cpu_seconds"],
        mdocs_per_s=DOCUMENTS / ours["seconds"] / 1e6,
        reading_seconds=reading["seconds"],
        reading_cpu_seconds=reading["cpu_seconds"],
        times_reading=ours["seconds"] / reading["seconds"],
        peak_megabytes=ours["peak"] / 1e6,
        peak_bytes_per_chosen=ours["peak"] / len(plan),
        reading_peak_megabytes=reading["peak"] / 1e6,
    )
