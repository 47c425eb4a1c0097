"""Front door of trajectory_match: the matching loss of dataset distillation over a list of tensors, its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ghostgram import _arrays, _dispatch
from ghostgram._arrays import Array
from ghostgram.ops import _torch

Arrays = Array | Sequence[Array]
Mask = int | Sequence[float] | Arrays | None


class TrajectoryGrad(NamedTuple):
    """What `trajectory_match_grad` returns."""

    loss: Array
    """(): num / D."""
    gradient: Arrays
    """2 m (student - target) / D: an array or a list of them, like student, in the dtype of the loss."""


def trajectory_match(
    student: Arrays, start: Arrays, target: Arrays, mask: Mask = None, *, backend: str = "auto"
) -> Array:
    r"""How far a student's parameters are from a target's, in units of the distance that it started from.

    Over all scalars j of all tensors, with weights m,

        L = num / D,    num = sum_j m_j (student_j - target_j)^2,    D = sum_j m_j (start_j - target_j)^2.

    One call takes the whole list; nothing is flattened or copied. For torch and JAX, L is differentiable by student, as
    often as wanted; start, target and mask are constants.

    Args:
        student: An array of any shape, or a list of them; float32, bfloat16, float16 or float64, one dtype for all.
        start: Where the student started, like student.
        target: Where it should arrive, like student.
        mask: Which scalars count, and how much. One of

            - None: all of them;
            - an int k: those with flat number j >= k, counted through the list in C order (PAD's depth mask);
            - a list of numbers >= 0: a weight for every tensor of the list;
            - an array or a list of arrays like student: a weight >= 0 for every scalar, bool or float32 (float64 for
              a float64 student).

            A scalar of weight 0 takes no part, even where it is infinite or NaN.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        L, a scalar array of the caller's type, float32 (float64 for a float64 student).

    Raises:
        TypeError: An argument is no array, of another framework than student, or of an unsupported dtype.
        ValueError: Shapes do not fit; the mask drops everything or holds a negative weight; or D is at most 1e-12 of
            sum_j m_j start_j^2, which is rounding: start and target are the same parameters.
        RuntimeError: The backend asked for is not available here, or start, target or mask require a gradient.

    Cost:
        8 FLOPs per scalar, 3 more for the gradient; reads student, start and target once, and for a gradient student
        and target once more. Dropped tensors and a dropped front are not read. An array that is not contiguous in C
        order costs a copy. On a GPU the call waits for num and D, to raise an error where they allow no loss; the
        backward does not wait.

    Source:
        The matching loss of MTT (arXiv 2203.11932); the depth mask is PAD's (arXiv 2408.03360).
    """
    args = (*checked(student, start, target, mask), backend)
    if _arrays.framework(args[0][0], "student") == "jax":
        return _jax_loss(*args)
    loss: Array = _torch.call("trajectory_match", *args)[0]
    return loss


def trajectory_match_grad(
    student: Arrays, start: Arrays, target: Arrays, mask: Mask = None, *, backend: str = "auto"
) -> TrajectoryGrad:
    """L of `trajectory_match` and its gradient by student, in one call and for every framework.

    All inputs are read as constants.

    Args:
        student: An array of any shape, or a list of them, as in `trajectory_match`, like all that follows.
        start: Where the student started, like student.
        target: Where it should arrive, like student.
        mask: None, a depth, weights of tensors, or weights of scalars.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        A `TrajectoryGrad`: L, and its gradient of student's structure in L's dtype.

    Raises:
        TypeError: As in `trajectory_match`, like all that follows.
        ValueError: Shapes do not fit, the mask is none, or start and target are the same parameters.
        RuntimeError: The backend asked for is not available here.

    Cost:
        11 FLOPs per scalar; reads start once, student once and target twice, and writes the gradient. Waits as
        `trajectory_match` does.

    Source:
        That of `trajectory_match`.
    """
    loss, gradient = _torch.call("trajectory_match_grad", *checked(student, start, target, mask), backend)
    return TrajectoryGrad(loss, gradient if isinstance(student, (list, tuple)) else gradient[0])


Checked = tuple[list[Array], list[Array], list[Array], list[Array] | None, list[float] | None, int]
"""student, start, target, a mask per scalar, a weight per tensor, the first flat scalar that counts."""


def checked(student: Arrays, start: Arrays, target: Arrays, mask: Mask) -> Checked:
    """The arguments as lists, the mask told apart by its type; or a clear error."""
    students = _list(student, "student", student)
    if not students:
        raise ValueError("student: expected an array, or a list of at least one, got an empty list")
    _fits(students, "student", student, students)
    _arrays.floating(students[0], _place("student", student, 0))
    starts, targets = _list(start, "start", student), _list(target, "target", student)
    for name, given in (("start", starts), ("target", targets)):
        _fits(given, name, student, students)
        if given[0].dtype != students[0].dtype:
            wanted, got = (_arrays.dtype_name(x[0]) for x in (students, given))
            raise TypeError(f"{_place(name, student, 0)}: expected {wanted} like student, got {got}")
    return students, starts, targets, *_weights(mask, student, students)


def _weights(mask: Mask, student: Arrays, students: list[Array]) -> tuple[list[Array] | None, list[float] | None, int]:
    if mask is None:
        return None, None, 0
    if isinstance(mask, int) and not isinstance(mask, bool):
        size = sum(math.prod(x.shape) for x in students)
        if not 0 <= mask < size:
            raise ValueError(f"mask: expected 0 <= k < {size}, the number of scalars, got {mask}")
        return None, None, mask
    if isinstance(mask, (list, tuple)) and all(isinstance(w, (int, float)) for w in mask):
        if len(mask) != len(students):
            raise ValueError(f"mask: expected a weight for each of {len(students)} tensors, got {len(mask)}")
        if not all(0 <= w < math.inf for w in mask) or not any(mask):
            raise ValueError(f"mask: expected weights >= 0 that are not all 0, got {list(mask)}")
        return None, [float(w) for w in mask], 0
    masks = _list(mask, "mask", student)
    _fits(masks, "mask", student, students)
    if _arrays.dtype_name(masks[0]) not in ("bool", _arrays.sum_dtype(students[0])):
        wanted, got = _arrays.sum_dtype(students[0]), _arrays.dtype_name(masks[0])
        raise TypeError(f"{_place('mask', student, 0)}: expected bool or {wanted}, got {got}")
    return masks, None, 0


def _place(name: str, student: Arrays, i: int) -> str:
    return f"{name}[{i}]" if isinstance(student, (list, tuple)) else name


def _list(given: Any, name: str, student: Arrays) -> list[Array]:
    """What was given as a list, of student's length; or an error."""
    listed, wanted = (isinstance(x, (list, tuple)) for x in (given, student))
    if listed != wanted or (wanted and len(given) != len(student)):
        expected, got = (
            f"a list of {len(x)}" if isinstance(x, (list, tuple)) else "one array" for x in (student, given)
        )
        raise ValueError(f"{name}: expected {expected} like student, got {got}")
    return list(given) if listed else [given]


def _fits(given: list[Array], name: str, student: Arrays, students: list[Array]) -> None:
    """Raises unless all are of the first student's framework, of one dtype, and each has the shape of its student."""
    like = students[0]
    kind = type(like)
    _arrays.same_framework(**{_place("student", student, 0): like, _place(name, student, 0): given[0]})
    dtype = given[0].dtype
    for i, (x, y) in enumerate(zip(given, students, strict=True)):
        # What an error would say is made for errors alone: this runs for every tensor of every call.
        if type(x) is not kind:
            _arrays.same_framework(**{_place("student", student, 0): like, _place(name, student, i): x})
        if x.dtype != dtype:
            wanted, got = _arrays.dtype_name(given[0]), _arrays.dtype_name(x)
            raise TypeError(f"{_place(name, student, i)}: expected {wanted} like {name}[0], got {got}")
        if x.shape != y.shape:
            raise ValueError(
                f"{_place(name, student, i)}: expected shape {tuple(y.shape)} like student, got {tuple(x.shape)}"
            )


def outputs(student: list[Array], *_: Any) -> tuple[Array, Array]:
    """The arrays that `compute` fills: the loss (), and (4,) num, D, sum_j m_j start_j^2, weights that are wrong."""
    like = student[0]
    return _arrays.empty(like, (), _arrays.sum_dtype(like)), _arrays.empty(like, (4,), "float64")


def compute(
    student: list[Array],
    start: list[Array],
    target: list[Array],
    mask: list[Array] | None,
    weights: list[float] | None,
    first: int,
    backend: str = "auto",
) -> tuple[Array, Array]:
    """The loss and its totals of checked inputs."""
    loss, totals = outputs(student)
    _run(backend, (student, start, target, mask), None, loss, totals, None, weights, first)
    _usable(totals, mask)
    return loss, totals


def grad_outputs(student: list[Array], *_: Any) -> tuple[Array, list[Array]]:
    """The arrays that `grad_compute` fills: the loss, and gradients of its dtype."""
    dtype = _arrays.sum_dtype(student[0])
    return _arrays.empty(student[0], (), dtype), [_arrays.empty(x, tuple(x.shape), dtype) for x in student]


def grad_compute(
    student: list[Array],
    start: list[Array],
    target: list[Array],
    mask: list[Array] | None,
    weights: list[float] | None,
    first: int,
    backend: str = "auto",
) -> tuple[Array, list[Array]]:
    """The loss of checked inputs and its gradient."""
    loss, gradient = grad_outputs(student)
    totals = outputs(student)[1]
    _run(backend, (student, start, target, mask), None, loss, totals, gradient, weights, first)
    _usable(totals, mask)
    return loss, gradient


def backward_outputs(student: list[Array], *_: Any) -> list[Array]:
    """The arrays that `backward_compute` fills: gradients of student's dtype."""
    dtype = _arrays.dtype_name(student[0])
    return [_arrays.empty(x, tuple(x.shape), dtype) for x in student]


def backward_compute(
    student: list[Array],
    target: list[Array] | None,
    mask: list[Array] | None,
    loss_gradient: Array,
    totals: Array,
    weights: list[float] | None,
    first: int,
    backend: str = "auto",
) -> list[Array]:
    """2 loss_gradient m (student - target) / D, with D from totals; without target it is 0."""
    gradient = backward_outputs(student)
    _run(backend, (student, None, target, mask), loss_gradient, None, totals, gradient, weights, first)
    return gradient


def _run(backend: str, lists: tuple[list[Array] | None, ...], *rest: Any) -> None:
    ready = (None if xs is None else [_arrays.contiguous(x) for x in xs] for xs in lists)
    _dispatch.run("trajectory_match", backend, *ready, *rest)


def _usable(totals: Array, mask: list[Array] | None) -> None:
    """Raises where the totals allow no loss; the kernel has written no gradient then.

    On a GPU this waits for the kernels: what they found wrong comes to the host in no other way.
    """
    if not _arrays.known(totals):
        return
    _, D, S, wrong = totals.tolist()
    if wrong:
        raise ValueError(f"mask: expected weights >= 0, got {wrong:.0f} that are not")
    if D <= 1e-12 * S:
        if mask is not None and not any(bool((x != 0).any()) for x in mask):
            raise ValueError("mask: expected some weight above 0, got none: nothing is left to match")
        raise ValueError(
            f"start: expected to differ from target by more than rounding, got D = {D:.3g} beside "
            f"sum_j m_j start_j^2 = {S:.3g}: are they one snapshot?"
        )


def _loss_autograd(below: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rest: tuple[Any, ...], *student: Array) -> Any:
            _, target, mask, *options = rest
            loss, totals = below(list(student), *rest)
            ctx.save_for_backward(totals, *student, *target, *(mask or ()))
            ctx.mark_non_differentiable(totals)
            ctx.tensors, ctx.options = len(student), options
            return loss, totals

        @staticmethod
        def backward(ctx: Any, loss_gradient: Array, _: Array) -> Any:
            totals, *saved = ctx.saved_tensors
            student, target, mask = (saved[i * ctx.tensors : (i + 1) * ctx.tensors] or None for i in range(3))
            gradient = _torch.call(
                "trajectory_match_backward", student, target, mask, loss_gradient, totals, *ctx.options
            )
            return None, *gradient

    def with_gradient(
        student: list[Array], start: list[Array], target: list[Array], mask: list[Array] | None, *options: Any
    ) -> Any:
        if not torch.is_grad_enabled():
            return below(student, start, target, mask, *options)
        for name, constants in (("start", start), ("target", target), ("mask", mask or ())):
            for i, x in enumerate(constants):
                if x.requires_grad:
                    raise RuntimeError(
                        f"{name}[{i}]: expected a constant, got a tensor that requires a gradient: trajectory_match "
                        "is differentiable by student alone"
                    )
        return Loss.apply((start, target, mask, *options), *student)  # type: ignore[no-untyped-call]

    return with_gradient


def _backward_autograd(below: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient is linear in loss_gradient and in student - target: its derivatives are such gradients again."""
    import torch

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rest: tuple[Any, ...], loss_gradient: Array, *student: Array) -> Any:
            target, mask, totals, *options = rest
            ctx.save_for_backward(loss_gradient, totals, *student, *(target or ()), *(mask or ()))
            ctx.tensors, ctx.has_target, ctx.options = len(student), target is not None, options
            return tuple(below(list(student), target, mask, loss_gradient, totals, *options))

        @staticmethod
        def backward(ctx: Any, *along: Array) -> Any:
            loss_gradient, totals, *saved = ctx.saved_tensors
            student, *lists = (saved[i : i + ctx.tensors] for i in range(0, len(saved), ctx.tensors))
            target = lists.pop(0) if ctx.has_target else None
            mask = lists.pop(0) if lists else None
            by_loss_gradient = None
            if ctx.needs_input_grad[1]:
                one = torch.ones_like(loss_gradient)
                per_unit = _torch.call("trajectory_match_backward", student, target, mask, one, totals, *ctx.options)
                dots = [torch.sum(x * y, dtype=torch.float64) for x, y in zip(per_unit, along, strict=True)]
                by_loss_gradient = torch.stack(dots).sum().to(loss_gradient.dtype)
            by_student = _torch.call(
                "trajectory_match_backward", list(along), None, mask, loss_gradient, totals, *ctx.options
            )
            return None, by_loss_gradient, *by_student

    def with_gradient(
        student: list[Array],
        target: list[Array] | None,
        mask: list[Array] | None,
        loss_gradient: Array,
        totals: Array,
        *options: Any,
    ) -> Any:
        if not torch.is_grad_enabled():
            return below(student, target, mask, loss_gradient, totals, *options)
        return list(
            Gradient.apply((target, mask, totals, *options), loss_gradient, *student)  # type: ignore[no-untyped-call]
        )

    return with_gradient


def _jax_loss(
    student: list[Array],
    start: list[Array],
    target: list[Array],
    mask: list[Array] | None,
    weights: list[float] | None,
    first: int,
    backend: str,
) -> Array:
    """The loss, with its derivatives for JAX: dL = gradient . dstudent, and d gradient = curvature * dstudent."""
    import jax
    from jax.custom_derivatives import SymbolicZero

    options = (weights, first, backend)

    def along(gradient: list[Array], dstudent: list[Any]) -> Any:
        moved = ((g, d) for g, d in zip(gradient, dstudent, strict=True) if not isinstance(d, SymbolicZero))
        return sum((jax.numpy.sum(g * d.astype(g.dtype)) for g, d in moved), jax.numpy.zeros((), gradient[0].dtype))

    def by_student_alone(tangents: tuple[Any, ...]) -> list[Any]:
        dstudent, *rest = tangents
        for name, constants in zip(("start", "target", "mask"), rest, strict=True):
            for i, tangent in enumerate(constants or ()):
                if not isinstance(tangent, SymbolicZero):
                    raise TypeError(
                        f"{name}[{i}]: expected a constant, got an array that a gradient is asked for: "
                        "trajectory_match is differentiable by student alone"
                    )
        return dstudent  # type: ignore[no-any-return]

    loss = jax.custom_jvp(lambda *lists: _torch.call("trajectory_match", *lists, *options)[0])
    loss_and_gradient = jax.custom_jvp(lambda *lists: _torch.call("trajectory_match_grad", *lists, *options))

    def loss_rule(lists: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        value, gradient = loss_and_gradient(*lists)
        return value, along(gradient, by_student_alone(tangents))

    def gradient_rule(lists: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        value, gradient = loss_and_gradient(*lists)
        ones = [jax.numpy.ones_like(g) for g in gradient]
        curvature = _torch.call_jax(_curvature, *jax.lax.stop_gradient(lists), ones, *options)
        dstudent = by_student_alone(tangents)
        by_curvature = [
            jax.numpy.zeros_like(c) if isinstance(d, SymbolicZero) else c * d.astype(c.dtype)
            for c, d in zip(curvature, dstudent, strict=True)
        ]
        return (value, gradient), (along(gradient, dstudent), by_curvature)

    loss.defjvp(loss_rule, symbolic_zeros=True)
    loss_and_gradient.defjvp(gradient_rule, symbolic_zeros=True)
    return loss(student, start, target, mask)


def _curvature(
    student: list[Array],
    start: list[Array],
    target: list[Array],
    mask: list[Array] | None,
    ones: list[Array],
    weights: list[float] | None,
    first: int,
    backend: str,
) -> list[Array]:
    """2 m / D, as gradients of a student of ones beside a target of zeros."""
    loss, totals = outputs(student)
    _run(backend, (student, start, target, mask), None, loss, totals, None, weights, first)
    _usable(totals, mask)
    curvature = backward_outputs(ones)
    _run(backend, (ones, None, None, mask), None, None, totals, curvature, weights, first)
    return curvature


_INPUTS = "Tensor[] student, Tensor[] start, Tensor[] target, Tensor[]? mask, float[]? weights, int first"
_torch.define(f"trajectory_match({_INPUTS}) -> (Tensor, Tensor)", compute, outputs, _loss_autograd, waits=True)
_torch.define(f"trajectory_match_grad({_INPUTS}) -> (Tensor, Tensor[])", grad_compute, grad_outputs, waits=True)
_torch.define(
    "trajectory_match_backward(Tensor[] student, Tensor[]? target, Tensor[]? mask, Tensor loss_gradient, "
    "Tensor totals, float[]? weights, int first) -> Tensor[]",
    backward_compute,
    backward_outputs,
    _backward_autograd,
)
