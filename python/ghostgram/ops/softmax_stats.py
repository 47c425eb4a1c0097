"""Front door of softmax_stats and el2n: how hard each row of logits finds its label, from one read."""

from __future__ import annotations

from typing import NamedTuple

from ghostgram import _arrays, _dispatch
from ghostgram._arrays import Array
from ghostgram.ops import _torch


class SoftmaxStats(NamedTuple):
    """What `softmax_stats` returns, each of the labels' leading shape."""

    loss: Array
    """Cross-entropy, in nats."""
    el2n: Array
    """Distance of the probabilities from the label, || p - q ||_2."""
    entropy: Array
    """Entropy of the probabilities, in nats."""
    max_probability: Array
    """The largest probability."""


def softmax_stats(logits: Array, labels: Array, ignore_index: int = -100, *, backend: str = "auto") -> SoftmaxStats:
    r"""Cross-entropy, EL2N, entropy and confidence of every row of logits, from one read of them.

    For a row of logits z with p = softmax(z) and the label q (onehot(y) for a class number y, or a distribution),

        loss = -sum_c q_c log p_c,         el2n = || p - q ||_2,
        entropy = -sum_c p_c log p_c,      max_probability = max_c p_c.

    However confident the row, all four have a small relative error: 1 - p_y is never formed, and no probability squared
    before it is scaled. So a sample that is learned to 1e-20 still ranks before one learned to 1e-19.

    Logits of -inf are classes that cannot be; the loss is inf where one of them is the label. A row with a NaN or +inf,
    or nothing but -inf, gives NaN. The sums run in a fixed order: the same bits for any number of threads. Inputs are
    read as constants: the results carry no autograd history.

    Args:
        logits: (N, C), or (..., C) as language models give them; float32, bfloat16, float16 or float64. Only the last
            axis must be contiguous: `logits[:, :-1]` is read in place.
        labels: The logits' shape without C, class numbers, int32 or int64; or of the logits' shape, distributions
            q >= 0 whose sum may be other than 1, of the logits' dtype or the results'.
        ignore_index: Rows with this class number are not read and give 0 in all results, like the losses of
            `torch.nn.functional.cross_entropy(reduction="none")`. Of no meaning for distributions.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        A `SoftmaxStats` of arrays of the caller's type, float32 (float64 for float64 logits), of the logits' shape
        without C.

    Raises:
        TypeError: An argument is no array, of another framework than logits, or of an unsupported dtype.
        ValueError: Shapes do not fit; the message names the argument, what was expected and what came.
        IndexError: A class number is neither in [0, C) nor ignore_index; the message names it and its row.
        RuntimeError: The backend asked for is not available here; the message says why.

    Cost:
        About 25 N C FLOPs, most of them for e^z; reads the logits once, which bounds it in float32. With distributions
        about 50, and every row is read twice, the second time from cache unless it is longer than that. On a GPU a call
        with class numbers waits for its result, to raise an IndexError where one is out of range; one with
        distributions does not.

    Source:
        EL2N is Paul, Ganguli and Dziugaite (arXiv 2107.07075, definition 2.2) for one model; average over runs. The
        sums that hold out the largest logit are this library's, see docs/ops/softmax_stats.md.
    """
    logits, labels, shape = checked(logits, labels)
    found = _torch.call("softmax_stats", logits, labels, ignore_index, backend)
    return SoftmaxStats(*(x.reshape(shape) for x in found))


def el2n(logits: Array, labels: Array, ignore_index: int = -100, *, backend: str = "auto") -> Array:
    r"""EL2N scores: the distance of every row's probabilities from its label, || softmax(z) - onehot(y) ||_2.

    sqrt(C / (C - 1)) (1 - p_y) <= el2n <= sqrt(2) (1 - p_y), with equality everywhere for two classes. The score of a
    data set's sample is its mean over several models, early in training: harder samples score higher.

    Args:
        logits: (N, C) or (..., C), as in `softmax_stats`, like all that follows.
        labels: Class numbers of the logits' shape without C, or distributions of the logits' shape.
        ignore_index: Rows with this class number give 0.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        Scores of the logits' shape without C, in [0, sqrt(2)] for class numbers.

    Raises:
        TypeError: As in `softmax_stats`, like all that follows.
        ValueError: Shapes do not fit.
        IndexError: A class number is neither in [0, C) nor ignore_index.
        RuntimeError: The backend asked for is not available here.

    Cost:
        That of `softmax_stats`.

    Source:
        Paul, Ganguli and Dziugaite (arXiv 2107.07075, definition 2.2).
    """
    return softmax_stats(logits, labels, ignore_index, backend=backend).el2n


def checked(logits: Array, labels: Array) -> tuple[Array, Array, tuple[int, ...]]:
    """(B,T,C) logits, (B,T) or (B,T,C) labels, and the shape of the results; or a clear error."""
    _arrays.same_framework(logits=logits, labels=labels)
    _arrays.floating(logits, "logits")
    if logits.ndim < 1:
        raise ValueError(f"logits: expected (..., C), got shape {tuple(logits.shape)}")
    shape, kind = tuple(logits.shape[:-1]), _arrays.dtype_name(labels)
    if kind in ("int32", "int64"):
        if tuple(labels.shape) != shape:
            raise ValueError(f"labels: expected shape {shape} like logits without C, got {tuple(labels.shape)}")
        return _rows(logits, len(shape)), _rows(labels, len(shape)), shape
    if kind not in (_arrays.dtype_name(logits), _arrays.sum_dtype(logits)):
        floats = " or ".join(dict.fromkeys((_arrays.dtype_name(logits), _arrays.sum_dtype(logits))))
        raise TypeError(f"labels: expected int32 or int64 class numbers, or {floats} distributions, got {kind}")
    if tuple(labels.shape) != tuple(logits.shape):
        raise ValueError(f"labels: expected distributions of shape {tuple(logits.shape)}, got {tuple(labels.shape)}")
    return _rows(logits, len(shape)), _rows(labels, len(shape)), shape


def _rows(x: Array, axes: int) -> Array:
    """Any number of leading axes as two, without a copy where there are no more than that."""
    if axes > 2:
        count = 1
        for n in x.shape[1:axes]:
            count *= n
        return x.reshape(x.shape[0], count, *x.shape[axes:])
    return x[(None,) * (2 - axes)]


def outputs(
    logits: Array, labels: Array, ignore_index: int, backend: str = "auto"
) -> tuple[Array, Array, Array, Array]:
    """The arrays that `compute` fills, each (B, T)."""
    samples, tokens = logits.shape[:2]
    loss, el2n, entropy, max_probability = [_arrays.sums(logits, samples, tokens) for _ in range(4)]
    return loss, el2n, entropy, max_probability


def compute(
    logits: Array, labels: Array, ignore_index: int, backend: str = "auto"
) -> tuple[Array, Array, Array, Array]:
    """All four of checked inputs."""
    out = outputs(logits, labels, ignore_index, backend)
    distributions = labels.ndim == 3
    labels = _arrays.unit_inner_stride(labels) if distributions else labels
    bad_row = _arrays.empty(logits, (), "int64")
    _dispatch.run("softmax_stats", backend, _arrays.unit_inner_stride(logits), labels, *out, bad_row, ignore_index)
    # On a GPU this waits for the kernels: what they found wrong comes to the host in no other way.
    if not distributions and _arrays.known(bad_row) and (row := int(bad_row)) >= 0:
        got = int(labels[divmod(row, labels.shape[1])])
        expected = f"0 <= label < {logits.shape[2]} or ignore_index {ignore_index}"
        raise IndexError(f"labels: expected {expected}, got {got} at row {row}")
    return out


_torch.define(
    "softmax_stats(Tensor logits, Tensor labels, int ignore_index) -> (Tensor, Tensor, Tensor, Tensor)",
    compute,
    outputs,
    waits=True,
)
