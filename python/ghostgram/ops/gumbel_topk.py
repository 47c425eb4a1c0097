"""Front door of gumbel_topk: draws without replacement from a softmax, at once or from a stream."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from ghostgram import _arrays, _dispatch
from ghostgram._arrays import Array
from ghostgram.ops import _torch


class UnequalScores(ValueError):
    """One id has two scores among the best; `id` is that id, as int64."""

    def __init__(self, id: int):
        super().__init__(id)
        self.id = id

    def __str__(self) -> str:
        unsigned = f" ({self.id + 2**64} as uint64)" if self.id < 0 else ""
        return f"ids: expected one score for each id, got two for id {self.id}{unsigned}"


def gumbel_topk(
    scores: Array, k: int, *, ids: Array | None = None, seed: int = 0, temperature: float = 1.0, backend: str = "auto"
) -> Array:
    r"""The indices of k documents drawn without replacement from softmax(scores / temperature), best first.

    Every document gets a key, and the k largest are kept, ties by the smaller id:

        key_i = scores_i / temperature + G_i,    G_i = -log(-log u_i),

    with u_i in (0, 1) drawn by Philox4x32-10 from the 64-bit id and the seed alone. The result follows the
    Plackett-Luce distribution: the first index is drawn from the softmax, the next from the softmax of the others, and
    so on. It has the same bits for any number of threads, and names the same documents for any order of the input.

    Args:
        scores: (n,) float32, float64, bfloat16 or float16, higher is likelier. +infinity is drawn first, -infinity
            last; -0.0 counts as 0.0.
        k: How many to draw, at least 0; all n if it is larger.
        ids: (n,) int32, int64 or uint64, by default 0 to n - 1: which noise a document gets, wherever it lies. Signed
            and unsigned ids of equal bits are equal, and compare as unsigned. Equal ids with equal scores are one
            document, found at its smallest index.
        seed: From 0 to 2^64 - 1.
        temperature: From 1e-300 to 1e300. At 0 there is no noise: the k largest scores.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        (min(k, n),) int64 indices into scores, of the caller's array type. JAX gives int32 unless its 64-bit types are
        enabled.

    Raises:
        TypeError: An argument is no array, of another framework than scores, or of an unsupported dtype.
        ValueError: A score is NaN (the message names its index); one id has two scores among the k best; equal ids
            leave fewer than min(k, n) documents; or an argument is out of its range.
        RuntimeError: The backend asked for is not available here; the message says why.

    Cost:
        One read of scores and ids and one Philox block (18 integer multiplications) for each document; two logarithms
        for about k (1 + log(n / k)) of them, or hardly more than k beyond n = 2^20. Memory besides the result: at most
        80 bytes times k and some MiB.

    Source:
        Gumbel-top-k is Yellott (1977) and Kool, van Hoof and Welling (2019, arXiv 1903.06059); Philox is Salmon et al.
        (SC 2011).
    """
    scores, ids = checked(scores, ids)
    k, seed, temperature = options(k, seed, temperature)
    indices, _ = _torch.call("gumbel_topk", scores, ids, k, seed, temperature, backend)
    return indices


class GumbelTopK:
    """`gumbel_topk` of a stream, in memory for k documents: update in any order and sharding, merge, same result.

    Documents are told apart by id, and a document seen twice counts once, so an update may be repeated after an error
    or an interruption. Instances pickle small (only the best k are kept) and resume where they were. What is kept lies
    where the last update's scores lie.

    Args:
        k: How many to keep, at least 0. Memory grows with what was seen, to at most 80 bytes times k and some MiB.
        seed: From 0 to 2^64 - 1, as in `gumbel_topk`; equal seeds give equal noise.
        temperature: From 1e-300 to 1e300, or 0 for the k largest scores without noise.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(self, k: int, seed: int = 0, temperature: float = 1.0, *, backend: str = "auto"):
        self._options = options(k, seed, temperature)
        self._backend = backend
        self._kind, self._id_dtype = "", ""
        self._held = 0
        self._state = reservoir(np.empty(0), 0)

    def update(self, scores: Array, ids: Array) -> None:
        """Takes documents in.

        Args:
            scores: (n,) float32, float64, bfloat16 or float16.
            ids: (n,) int32, int64 or uint64, of the same dtype in every update.

        Raises:
            TypeError: An argument is no array, of another framework than scores, or of an unsupported dtype.
            ValueError: Shapes do not fit, or a score is NaN (the message names its index). Other documents of this
                update may have been taken in: repeat it with scores put right. To know of it, an update waits for a
                GPU, once.
        """
        if ids is None:
            raise TypeError("ids: expected an array, got None: in a stream, a document's position is no id")
        kind, id_dtype = _arrays.framework(scores, "scores"), _arrays.dtype_name(ids)
        if kind == "jax":  # whose arrays cannot be written to: what is kept is NumPy's
            scores, ids = _arrays.jax_numbers(scores, "scores"), _arrays.jax_numbers(ids, "ids")
        scores, ids = checked(scores, ids)
        self._expect_ids(id_dtype, "ids")
        self._take(_arrays.unit_inner_stride(scores), ids, *self._options)
        self._kind, self._id_dtype = self._kind or kind, id_dtype

    def merge(self, other: GumbelTopK) -> None:
        """Takes in what another one has seen; a document seen by both counts once.

        Raises:
            ValueError: The other has another k, seed or temperature.
            TypeError: The other has ids of another dtype.
        """
        if other._options != self._options:
            raise ValueError(
                f"other: expected (k, seed, temperature) = {self._options} like this one, got {other._options}"
            )
        if other is self or not other._kind:
            return
        self._expect_ids(other._id_dtype, "other")
        keys, ids = (x[: other._held] for x in other._state[:2])
        if self._kind:
            keys, ids = (_arrays.moved(x, self._state[0]) for x in (keys, ids))
        k, seed, _ = self._options
        self._take(keys, ids, k, seed, 0.0)  # at temperature 0 a score is its own key
        self._kind, self._id_dtype = self._kind or other._kind, other._id_dtype

    def result(self) -> tuple[Array, Array]:
        """The ids of the k best and their keys, best first.

        Returns:
            (m,) ids in their own dtype and (m,) float64 keys, of the array type of the first update, where the last
            one's scores lie; m is k, or the number of documents if that is smaller. JAX gives 32-bit types unless its
            64-bit ones are enabled.

        Raises:
            ValueError: One id has two scores among the k best; the message names it.
        """
        keys, ids = self._best()
        ids, kind = _arrays.ids_back(ids, self._id_dtype or "int64"), self._kind or "numpy"
        return _arrays.in_framework(ids, kind), _arrays.in_framework(keys, kind)

    def _expect_ids(self, dtype: str, name: str) -> None:
        if self._id_dtype and dtype != self._id_dtype:
            raise TypeError(f"{name}: expected ids of dtype {self._id_dtype} as before, got {dtype}")

    def _take(self, scores: Array, ids: Array, k: int, seed: int, temperature: float, finish: bool = False) -> None:
        keys, picks, words, threshold = (_arrays.moved(x, scores) for x in self._state)
        room = capacity(k, self._held + scores.shape[0])
        if room > keys.shape[0]:  # by doubling, so that many small updates copy little
            grown = reservoir(keys, min(capacity(k, 2 * room), 2 * room))[:2]
            for new, old in zip(grown, (keys, picks), strict=True):
                new[: self._held] = old[: self._held]
            keys, picks = grown
        self._state = keys, picks, words, threshold
        _dispatch.run(
            *("gumbel_topk", self._backend, scores, ids, keys, picks, words[:1], threshold, words[1:]),
            *(k, seed, temperature, False, finish),
        )
        self._held, *fault = words.tolist()
        raise_fault(*fault)

    def _best(self) -> tuple[Array, Array]:
        """The k best keys and ids, best first, in memory of their own."""
        home = self._state[0]
        scores, ids = _arrays.empty(home, (0,), "float64"), _arrays.empty(home, (0,), "int64")
        self._take(scores, ids, *self._options, finish=True)
        keys, ids = (_arrays.copied(x[: self._held]) for x in self._state[:2])
        return keys, ids

    def __getstate__(self) -> dict[str, Any]:
        self._best()
        keys, ids, words, threshold = (_arrays.to_numpy(x) for x in self._state)
        best = (keys[: self._held].copy(), ids[: self._held].copy(), words, threshold)
        return self.__dict__ | {"_state": best}


def capacity(k: int, documents: int) -> int:
    """Entries that a reservoir needs for so many documents.

    As many as there are, or 4 k: each time it is full, the documents seen have multiplied by exp(3), so it is thinned
    seldom. And 2^16, because rounds of fewer documents are not worth waking threads for.
    """
    return min(documents, 4 * k + 2**16)


def reservoir(like: Array, size: int) -> tuple[Array, Array, Array, Array]:
    """Keys, picks, words and the threshold of an empty reservoir.

    The words are how many it holds and the four of a fault (gumbel_topk.h), side by side: a card is asked once.
    """
    words, threshold = _arrays.empty(like, (5,), "int64"), _arrays.empty(like, (1,), "float64")
    words[...], threshold[...] = 0, -float("inf")
    return _arrays.empty(like, (size,), "float64"), _arrays.empty(like, (size,), "int64"), words, threshold


def raise_fault(nan_at: int, two_scores: int, two_scores_id: int, no_room: int) -> None:
    """Raises what a room has written down."""
    if no_room:
        raise RuntimeError("gumbel_topk: the reservoir has no room, and nothing was taken in")
    if nan_at >= 0:
        raise ValueError(f"scores: expected numbers, got NaN at index {nan_at}")
    if two_scores:
        raise UnequalScores(two_scores_id)


def checked(scores: Array, ids: Array | None) -> tuple[Array, Array | None]:
    """(n,) scores and (n,) int64 ids, or a clear error."""
    _arrays.same_framework(scores=scores, ids=ids)
    _arrays.floating(scores, "scores")
    if scores.ndim != 1:
        raise ValueError(f"scores: expected shape (n,), got {tuple(scores.shape)}")
    if ids is None:
        return scores, None
    if tuple(ids.shape) != tuple(scores.shape):
        raise ValueError(f"ids: expected shape {tuple(scores.shape)} like scores, got {tuple(ids.shape)}")
    return scores, _arrays.ids_64(ids, "ids")


def options(k: int, seed: int, temperature: float) -> tuple[int, int, float]:
    """k, the seed as the int64 of its bits, and the temperature; or a clear error."""
    k, seed, temperature = operator.index(k), operator.index(seed), float(temperature)
    if k < 0:
        raise ValueError(f"k: expected at least 0, got {k}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 to 2^64 - 1, got {seed}")
    if not (temperature == 0 or 1e-300 <= temperature <= 1e300):
        raise ValueError(f"temperature: expected 0, or from 1e-300 to 1e300, got {temperature}")
    return k, seed - 2**64 if seed >= 2**63 else seed, temperature


def outputs(
    scores: Array, ids: Array | None, k: int, seed: int, temperature: float, backend: str = "auto"
) -> tuple[Array, Array]:
    """The arrays that `compute` returns: indices and keys, (min(k, n),)."""
    shape = (min(k, scores.shape[0]),)
    return _arrays.empty(scores, shape, "int64"), _arrays.empty(scores, shape, "float64")


def compute(
    scores: Array, ids: Array | None, k: int, seed: int, temperature: float, backend: str = "auto"
) -> tuple[Array, Array]:
    """Indices and keys of checked inputs."""
    keys, picks, words, threshold = reservoir(scores, capacity(k, scores.shape[0]))
    scores = _arrays.unit_inner_stride(scores)
    _dispatch.run(
        *("gumbel_topk", backend, scores, ids, keys, picks, words[:1], threshold, words[1:]),
        *(k, seed, temperature, True, True),
    )
    out = outputs(scores, ids, k, seed, temperature, backend)
    m = out[0].shape[0]
    if _arrays.known(words):
        held, *fault = words.tolist()
        raise_fault(*fault)
        if held < m:
            raise ValueError(f"ids: expected at least {m} different ones, got {held}")
    out[0][...], out[1][...] = picks[:m], keys[:m]
    return out


_torch.define(
    "gumbel_topk(Tensor scores, Tensor? ids, int k, int seed, float temperature) -> (Tensor, Tensor)",
    compute,
    outputs,
    waits=True,
)
