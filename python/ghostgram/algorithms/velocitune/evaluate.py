"""Losses of domains on their evaluation sets, with standard errors, the same for any number of processes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from ghostgram.algorithms.velocitune.losses import NextTokenLoss, Sums, of_one_length
from ghostgram.training.aside import evaluating
from ghostgram.training.ranks import Ranks, rank_and_size

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

Loss = Callable[[Sequence[Any]], Sums]
"""From sequences to their summed losses and counted tokens."""


class DomainLosses(NamedTuple):
    """What `evaluate_domains` returns, in the order of the evaluation sets."""

    loss: F64
    """(K,) mean loss of a token, in nats."""
    se: F64
    """(K,) its standard error, sequences being what is sampled."""
    tokens: I64
    """(K,) tokens counted."""
    sequences: I64
    """(K,) sequences evaluated."""


def evaluate_domains(
    model: nn.Module,
    eval_sets: Mapping[str, Sequence[Any]],
    *,
    loss: Loss | None = None,
    reduce: str = "ordered",
    batch: int = 8,
    progress: Callable[[str, int, int], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> DomainLosses:
    r"""The mean loss of a token of every domain, and its standard error.

    With S_j the summed loss and T_j the counted tokens of sequence j,

        l = sum_j S_j / sum_j T_j,     se = sqrt( n / (n-1) sum_j (S_j - l T_j)^2 ) / sum_j T_j,

    a ratio of means whose standard error takes sequences as they were sampled: the tokens of one are not independent.
    The model is in evaluation mode meanwhile; its modes, `.grad` and random states are afterwards what they were.

    Where a process group is there, every process must call this alike: process r of W evaluates sequences r, r + W, ...
    of each set, none twice. Models wrapped in DistributedDataParallel are run without the wrapper. Under `fully_shard`
    every forward is a collective: processes with fewer sequences run one again, and sequences that differ in length
    are run one at a time.

    Args:
        model: As in `NextTokenLoss`, if `loss` is None.
        eval_sets: Fixed sequences by domain, at least two of each, the same on every process.
        loss: From a list of sequences to `Sums`; None for `NextTokenLoss(model)`.
        reduce: "ordered": every process gets S_j and T_j of all sequences and sums them in order of j, so results do
            not depend on W; "sums": processes add up six sums a domain, which depends on W by rounding.
        batch: Sequences that are run at once.
        progress: Called with the domain, the sequences done and those to do, of this process.
        group: The processes; None for all of them.

    Returns:
        Losses in nats per token, and their standard errors, in the order of `eval_sets`; the same on every process.

    Raises:
        ValueError: A set has fewer than two sequences or no target, or an option is out of range.
        FloatingPointError: A loss is not finite; the message names the domain and, if "ordered", the sequence.

    Cost:
        2 FLOPs a token and weight, without the logits' memory; "ordered" sends 24 bytes a sequence, "sums" 48 a domain.

    Source:
        The ratio estimator: W. G. Cochran, Sampling Techniques, section 6.4. Velocitune (arXiv 2411.14318) evaluates
        domains so every m steps; standard errors are this library's.
    """
    if reduce not in ("ordered", "sums"):
        raise ValueError(f'reduce: expected "ordered" or "sums", got {reduce!r}')
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    for name, sequences in eval_sets.items():
        if len(sequences) < 2:
            raise ValueError(f"eval_sets: expected at least two sequences of {name!r}, got {len(sequences)}")
    rank, world = rank_and_size(group)
    ranks = Ranks(model, list(model.parameters()))
    in_step = ranks.sharded and world > 1
    measure = NextTokenLoss(ranks.model) if loss is None else loss
    with torch.no_grad(), ranks.aside(), evaluating(ranks.model, list(model.parameters())):
        mine = []
        for name, sequences in eval_sets.items():
            at_once = 1 if in_step and loss is None and not of_one_length(sequences) else batch
            mine.append(_measured(measure, name, sequences, _Part(rank, world, at_once, in_step), progress))
    if reduce == "ordered":
        return _in_order(eval_sets, mine, world, group)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return _by_sums(eval_sets, mine, world, group, device)


def duplicates(
    eval_sets: Mapping[str, Sequence[Any]], training: Iterable[Any], content: Callable[[Any], bytes] | None = None
) -> dict[str, list[int]]:
    """Sequences of evaluation sets that are found again, token for token, in training data or in an earlier set.

    Args:
        eval_sets: Sequences by domain.
        training: Sequences that are trained on.
        content: What of a sequence is compared; None for its token numbers, or its `input_ids`.

    Returns:
        The places of such sequences, by domain; no entry where there are none.

    Cost:
        A hash of 16 bytes kept for each training sequence.
    """
    of = _content if content is None else content
    seen = {hashlib.blake2b(of(sequence), digest_size=16).digest() for sequence in training}
    found: dict[str, list[int]] = {}
    for name, sequences in eval_sets.items():
        for place, sequence in enumerate(sequences):
            digest = hashlib.blake2b(of(sequence), digest_size=16).digest()
            if digest in seen:
                found.setdefault(name, []).append(place)
            seen.add(digest)
    return found


def _content(sequence: Any) -> bytes:
    tokens = sequence["input_ids"] if isinstance(sequence, dict) else sequence
    return np.asarray(tokens, np.int64).tobytes()


class _Part(NamedTuple):
    """What this process does of a set, and whether all must call the model equally often."""

    rank: int
    world: int
    batch: int
    in_step: bool


def _measured(
    measure: Loss,
    name: str,
    sequences: Sequence[Any],
    part: _Part,
    progress: Callable[[str, int, int], None] | None,
) -> F64:
    """(n, 3): number, summed loss and tokens of the sequences of this process."""
    places = list(range(part.rank, len(sequences), part.world))
    most, batch = -(-len(sequences) // part.world), part.batch
    calls = range(0, most if part.in_step else len(places), batch)
    found = []
    for start in calls:
        some = places[start : start + batch]
        sums = measure([sequences[place] for place in some or [0]])
        if some:
            losses, tokens = sums.losses.double().cpu().numpy(), sums.tokens.cpu().numpy()
            found.append(np.stack([np.array(some, np.float64), losses, tokens.astype(np.float64)], axis=1))
        if progress is not None:
            progress(name, min(start + batch, len(places)), len(places))
    return np.concatenate(found) if found else np.empty((0, 3))


def _in_order(
    eval_sets: Mapping[str, Sequence[Any]], mine: list[F64], world: int, group: dist.ProcessGroup | None
) -> DomainLosses:
    parts: list[list[F64]] = [mine]
    if world > 1:
        parts = [[] for _ in range(world)]
        dist.all_gather_object(parts, mine, group=group)
    rows = []
    for k, name in enumerate(eval_sets):
        together = np.concatenate([part[k] for part in parts])
        numbers, losses, tokens = together[np.argsort(together[:, 0])].T
        if (wrong := np.flatnonzero(~np.isfinite(losses))).size:  # known to all processes, so that none waits for one
            number = int(numbers[wrong[0]])
            raise FloatingPointError(f"loss: {losses[wrong[0]]} for sequence {number} of domain {name!r}")
        counted = math.fsum(tokens)
        mean = _mean(name, math.fsum(losses), counted)
        rows.append(_row(mean, math.fsum((losses - mean * tokens) ** 2), counted, len(losses)))
    return _stacked(rows)


def _by_sums(
    eval_sets: Mapping[str, Sequence[Any]],
    mine: list[F64],
    world: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> DomainLosses:
    sums = torch.tensor(
        [[len(s), s.sum(), t.sum(), s @ s, s @ t, t @ t] for _, s, t in (part.T for part in mine)],
        dtype=torch.float64,
        device=device,
    )
    if world > 1:
        dist.all_reduce(sums, group=group)
    rows = []
    for name, (n, s, t, ss, st, tt) in zip(eval_sets, sums.tolist(), strict=True):
        if not math.isfinite(s):
            raise FloatingPointError(f"loss: {s} in sum for domain {name!r}")
        mean = _mean(name, s, t)
        rows.append(_row(mean, max(0.0, ss - 2 * mean * st + mean**2 * tt), t, int(n)))
    return _stacked(rows)


def _mean(name: str, total: float, counted: float) -> float:
    if counted == 0:
        raise ValueError(f"eval_sets: expected tokens that count in {name!r}, got none")
    return total / counted


def _row(mean: float, squares: float, counted: float, n: int) -> tuple[float, float, int, int]:
    return mean, math.sqrt(n / (n - 1) * squares) / counted, int(counted), n


def _stacked(rows: list[tuple[float, float, int, int]]) -> DomainLosses:
    means, errors, tokens, sequences = zip(*rows, strict=True)
    return DomainLosses(np.array(means), np.array(errors), np.array(tokens, np.int64), np.array(sequences, np.int64))
