"""Scores the pool: one z-score for each document and reference, by whichever engine, with the same bits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ghostgram.algorithms.mates.files.identity import content_key
from ghostgram.algorithms.mates.files.places import Place
from ghostgram.algorithms.mates.files.pool import Pool, Shard, documents_schema
from ghostgram.algorithms.mates.files.store import Stage
from ghostgram.algorithms.mates.scoring.engine import Work, run_units
from ghostgram.algorithms.mates.sums import LIMIT, ExactSums

BATCH = 128
"""Documents scored at a time, of about equal length."""

_WINDOW = 1 << 15  # documents sorted by length together, ...
_WINDOW_BYTES = 1 << 27  # ... fewer if they have more text than this
_NAMED = 8  # ids in a message


class ScoreError(ValueError):
    """A scorer gave something that is no score; the message names the shard and the documents."""


class Scorer(Protocol):
    """What scores texts: a fitted influence model."""

    @property
    def references(self) -> Sequence[str]:
        """R names."""

    @property
    def digest(self) -> str:
        """What its scores depend on."""

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, R) finite z-scores; higher is better."""

    def save(self, folder: Path) -> None:
        """Writes what a loader reads into a folder that is not there yet."""


Loader = Callable[[Path], Scorer]
"""Reads what `Scorer.save` wrote; pickled into worker processes, so it has to be importable there."""


def score(
    pool: Pool,
    scorer: Scorer,
    run: str | Path,
    load: Loader,
    *,
    stage: int = 1,
    engine: str = "local",
    workers: int | None = None,
    gpus: int = 0,
) -> Stage:
    """Scores every document of the pool, shard by shard; what was scored before an interruption is not scored again.

    Each shard becomes a part of the same number, rows in the order of the shard: doc_id fixed_size_binary(16), n_tokens
    int32 and domain string (null where the pool does not say), cluster_id string if the pool names clusters, and
    z_<reference> float32 for each reference. No text. A commit holds `ExactSums` of every z_<reference>.

    Documents are sorted by length within windows of at most 32,768 of them (or the first to reach 128 MiB of text) and
    scored 128 at a time, so padding is small, and batches, hence bits, depend on the shard alone.

    Args:
        pool: What to score.
        scorer: What scores; saved into the stage, from where every process loads it.
        run: Folder of the run: local, or a URI that fsspec knows (workers on other machines must see it).
        load: What reads a saved scorer.
        stage: Number of the stage, from 1.
        engine: "local" or "ray", see `run_units`.
        workers: How many processes, see `run_units`.
        gpus: How many GPUs they share, see `run_units`.

    Returns:
        The complete stage. Its manifest holds the references, the digests of pool and scorer, and counts.

    Raises:
        EngineError: Scoring a shard failed; the message has what was wrong: a `PoolError` names the file and the row,
            a `ScoreError` (a score that is not finite, or of the wrong shape or type) the file and the ids.
        StoreError: The stage's manifest is damaged or says something else; the message names it.
        ValueError: Two references share a name, or an argument is out of its range.

    Cost:
        One pass over the pool (after the one that listed it) and that of the scorer. Memory of a process: the scorer,
        one window of text, and the part, about 30 + 4 R bytes a document.
    """
    references = list(scorer.references)
    if not references or len(set(references)) != len(references):
        raise ValueError(f"scorer: expected references with names of their own, got {references}")
    key = content_key("score", {"batch": BATCH, "references": references},
                      {"pool": pool.digest, "scorer": scorer.digest})  # fmt: skip
    made = Stage(run, stage, "score", key)
    made.begin(pool=pool.digest, scorer=scorer.digest, references=references)
    shards = {f"{number:06d}": shard for number, shard in enumerate(pool.shards)}
    inputs = {unit: shard.digest for unit, shard in shards.items()}
    done = made.committed(inputs)
    if len(done) < len(shards):
        saved = Place(f"{made.folder}/scorer")
        with tempfile.TemporaryDirectory() as folder:
            scorer.save(Path(folder, "scorer"))
            saved.write_tree(Path(folder, "scorer"))
        work = _Scoring(made, pool, saved, load, scorer.digest)
        done = run_units(made, shards, work, inputs=inputs, engine=engine, workers=workers, gpus=gpus)
    made.complete(tokens=sum(each.sums["n_tokens"] for each in done.values()) if pool.n_tokens else None)
    return made


@dataclass(frozen=True)
class _Scoring:
    """What a worker needs to start."""

    stage: Stage
    pool: Pool
    saved: Place
    load: Loader
    digest: str

    def __call__(self) -> Work:
        with self.saved.tree() as folder:
            scorer = self.load(folder)
        if scorer.digest != self.digest:
            raise ScoreError(f"{self.saved.folder}: expected a scorer of digest {self.digest}, got {scorer.digest}")

        def work(unit: str, shard: Shard) -> None:
            table = scored(self.pool, shard, scorer)
            sums: dict[str, Any] = {}
            for name in table.column_names:
                if name.startswith("z_"):
                    exact = ExactSums()
                    exact.add(table[name].to_numpy().astype(np.float64))
                    sums[name] = asdict(exact)
            sums["n_tokens"] = int(table["n_tokens"].fill_null(0).to_numpy().sum(dtype=np.int64))
            self.stage.commit(unit, table, sums, input=shard.digest)

        return work


def scored(pool: Pool, shard: Shard, scorer: Scorer) -> Any:
    """The table of scores of one shard.

    Raises:
        PoolError: The shard cannot be read.
        ScoreError: A score is not finite or too large, or the scorer's answer has another shape or type.
    """
    import pyarrow as pa

    kept = ["doc_id", "n_tokens", "domain", *(["cluster_id"] if pool.cluster else [])]
    columns = [f"z_{name}" for name in scorer.references]
    schema = documents_schema()
    fields = [schema.field(name) for name in kept] + [pa.field(name, pa.float32(), nullable=False) for name in columns]
    parts = [pa.schema(fields).empty_table()]
    for window in _windows(pool.documents(shard)):
        z = _scores(shard, window, scorer)
        arrays = [window[name] for name in kept] + [pa.array(z[:, at]) for at in range(len(columns))]
        parts.append(pa.table(arrays, schema=parts[0].schema))
    return pa.concat_tables(parts)


def _windows(tables: Iterator[Any]) -> Iterator[Any]:
    """The documents of a shard cut where `_WINDOW` or `_WINDOW_BYTES` is reached, however they come."""
    import pyarrow as pa
    import pyarrow.compute as pc

    held: list[Any] = []
    rows = size = 0
    for table in tables:
        ends = np.cumsum(pc.binary_length(table["text"]).to_numpy())
        start = 0
        while start < len(table):
            before = ends[start - 1] if start else 0
            full = int(np.searchsorted(ends, before + _WINDOW_BYTES - size)) + 1  # the document that reaches it is in
            stop = min(len(table), start + _WINDOW - rows, full)
            held.append(table[start:stop])
            rows, size, start = rows + stop - start, size + int(ends[stop - 1] - before), stop
            if rows == _WINDOW or size >= _WINDOW_BYTES:
                yield pa.concat_tables(held)
                held, rows, size = [], 0, 0
    if held:
        yield pa.concat_tables(held)


def _scores(shard: Shard, window: Any, scorer: Scorer) -> NDArray[np.float32]:
    """(n, R) scores of documents, in their order."""
    import pyarrow.compute as pc

    rows, heads = len(window), len(scorer.references)
    order = np.argsort(pc.binary_length(window["text"]).to_numpy(), kind="stable")
    z = np.empty((rows, heads), np.float32)
    for start in range(0, rows, BATCH):
        chosen = order[start : start + BATCH]
        found = scorer.score(window["text"].take(chosen).to_pylist())
        if found.shape != (len(chosen), heads) or found.dtype != np.float32:
            raise ScoreError(
                f"{shard.path}: expected float32 scores of shape {(len(chosen), heads)}, got {found.dtype} of shape "
                f"{found.shape}"
            )
        z[chosen] = found
    wrong = np.flatnonzero(~(np.abs(z) < LIMIT).all(axis=1))
    if len(wrong):
        named = ", ".join(name.hex() for name in window["doc_id"].take(wrong[:_NAMED]).to_pylist())
        raise ScoreError(f"{shard.path}: expected finite scores below {LIMIT:.0f} in size, got {z[wrong[0]]} and such "
                         f"for {len(wrong)} documents: {named}{', ...' if len(wrong) > _NAMED else ''}")  # fmt: skip
    return z
