"""The taps of one model: on while a step is scored, gone from the model in between."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ghostgram.taps.sharding import whole
from ghostgram.taps.uses import Kept, RowsUse, Use

if TYPE_CHECKING:
    from ghostgram.taps.coverage import Coverage

Gradients = bool | Literal["later"]
"""Whether a backward computes the parameters' own gradients, or keeps what they are made of."""


class NoSampleAxisError(ValueError):
    """A layer's input does not have the sample in its first dimension."""


@dataclass(frozen=True)
class Slot:
    """One parameter of a tapped layer, as the layer's backward sees it while a step is scored.

    A layer's backward returns the dots as the gradient of `probe`, an input of its autograd.Function that nothing
    reads. So autograd adds up the uses of a tied or reused parameter itself, and a compiled graph has no side effect.
    """

    directions: Tensor | None = None
    """(K, *shape) of the whole parameter to contract with; None when it is not scored or its directions come later."""
    probe: Tensor | None = None
    """(rows, K) of zeros, whose gradient the dots are; empty where it is there only to make autograd call the layer's
    backward; None where nothing is wanted of it."""
    parameter: nn.Parameter | None = None
    """The parameter, as the optimizer knows it; None when it is neither scored nor kept."""
    mark: str = ""
    """Names the parameter to `_note_rounded`; empty when it is not scored."""
    rows: tuple[int, int] | None = None
    """Where the parameter's rows that this use reads start and stop; None where it reads all."""

    def part(self, start: int, stop: int) -> Slot:
        """The slot of the parameter's rows start to stop."""
        return replace(self, rows=(start, stop))

    def keep(self, taps: Taps, use: Callable[[], Use]) -> None:
        """Keeps a use of these rows, if the parameter is wanted later."""
        if self.parameter is not None:
            kept = use()
            taps.keep(self.parameter, kept if self.rows is None else RowsUse(kept, *self.rows, len(self.parameter)))


_EMPTY = Slot()


@dataclass(frozen=True)
class Tap:
    """What a tapped module's forward finds at `module._ghostgram`."""

    taps: Taps
    batch: int
    """The first dimension of every layer's input."""
    segments: Tensor | None
    """(batch, T) row of each position where a row of dots is a document; None where it is a sample."""
    rows: int
    """The rows of dots: samples, or documents."""
    slots: Mapping[str, Slot]
    keeps: bool
    """Whether layers keep their uses of parameters, because directions or weights of samples come later."""
    gradients: bool
    """Whether backward computes the parameters' own gradients."""

    def slot(self, name: str) -> Slot:
        """The slot of the module's parameter of that name."""
        return self.slots.get(name, _EMPTY)

    def scoring(self, weight: Slot, bias: Slot = _EMPTY) -> tuple[Any, ...]:
        """What scores a layer's two parameters: the last `SCORING` arguments of its autograd.Function."""
        later = (self, weight, bias) if self.keeps else None
        return (
            weight.directions, weight.probe, weight.rows, bias.directions, bias.probe, bias.rows,
            self.segments, self.rows, later,
        )  # fmt: skip

    def check_samples(self, x: Tensor, layer: str) -> None:
        """Raises unless the first dimension of a layer's input is the sample (and, in packed rows, the second T)."""
        if x.dim() < 2 or x.shape[0] != self.batch:
            raise NoSampleAxisError(
                f"{layer}: expected an input whose first dimension is the sample ({self.batch}), got {tuple(x.shape)}"
            )
        if self.segments is not None and (x.dim() < 3 or x.shape[1] != self.segments.shape[1]):
            raise ValueError(
                f"{layer}: packed documents need an input (samples, positions, ...) with {self.segments.shape[1]} "
                f"positions, got {tuple(x.shape)}"
            )

    def trained(self, parameter: Tensor | None) -> Tensor | None:
        """A parameter as the layer should take it: detached where backward is not to compute its gradient."""
        return parameter if parameter is None or self.gradients else parameter.detach()

    def note_dtype(self, dtype: torch.dtype) -> None:
        """Remembers that the gradients of this module's parameters pass through a 16-bit dtype."""
        if dtype.itemsize == 2:
            for slot in self.slots.values():
                if slot.mark:
                    _note_rounded(slot.mark)


_noting: weakref.WeakValueDictionary[str, Taps] = weakref.WeakValueDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _note_rounded(mark: str) -> None:
    """Books that a parameter's gradient passes through a 16-bit dtype.

    torch.compile calls it once, while it traces: in a checkpointed block, no other side effect is allowed. Hence the
    strings, which are constants to it.
    """
    session, _, parameter = mark.partition(" ")
    taps = _noting[session]
    taps.rounded.add(taps.scored[int(parameter)])


class Taps:
    """Per-sample dots `<g_i, D_k>` of every covered parameter, taken where its gradient is computed anyway.

    While `samples` is open, the `forward` of each covered module is replaced by one whose backward also contracts.
    Dots are accumulated per *parameter*: a weight used twice, or tied between two modules, adds up, which is exact
    because the dot is linear in the gradient.

    Args:
        coverage: Which modules to tap, from `cover`.
        dots_needed: The parameters to score; the other parameters of tapped modules get their gradient alone.
        pass_over: Whether a layer whose input has no sample axis computes as if it had no tap, and its parameters are
            put into `passed_over`, instead of raising an error.
    """

    def __init__(self, coverage: Coverage, dots_needed: Sequence[nn.Parameter], pass_over: bool = False) -> None:
        self._modules = coverage.tapped
        scored = set(dots_needed)
        self._parameters = {
            module: {n: p for n, p in module.named_parameters(recurse=False) if p in scored or p.requires_grad}
            for module, _ in self._modules
        }
        present = dict.fromkeys(p for named in self._parameters.values() for p in named.values())
        self.scored = [p for p in present if p in scored]
        self._names = {p: name for name, p in (coverage.scored | coverage.excluded).items()}
        self._marks = {p: f"{id(self)} {index}" for index, p in enumerate(self.scored)}
        _noting[str(id(self))] = self
        self._dots: dict[nn.Parameter, Tensor] = {}
        self._kept: Kept = []
        self._open = False
        self.rounded: set[nn.Parameter] = set()
        """Parameters whose gradient passed through a 16-bit dtype."""
        self._pass_over = pass_over
        self.passed_over: dict[nn.Parameter, None] = {}
        """Scored parameters of layers that met an input without a sample axis, in the order in which they did."""

    @contextmanager
    def samples(
        self,
        batch: int,
        directions: Mapping[nn.Parameter, Tensor] | None,
        *,
        segments: Tensor | None = None,
        documents: int = 0,
        gradients: Gradients = True,
    ) -> Iterator[None]:
        """Scores the backward passes inside, whose layer inputs have `batch` samples in their first dimension.

        Args:
            batch: The number of samples B.
            directions: parameter -> (K, *shape), in the parameter's accumulation dtype, sharded as the parameter is
                (`sharding.parts_of`). None when they are not known yet: every use of a scored parameter is then kept
                until `contract`.
            segments: (B, T) integers: the document, 0 to documents - 1, of each position; a row of dots is then a
                document's, by position. Negative for positions of no document.
            documents: The number of documents in `segments`.
            gradients: Whether backward also computes the parameters' own gradients. "later": it leaves .grad alone,
                and every use of a trainable parameter of a tapped module, scored or not, is kept until `accumulate`.

        Raises:
            RuntimeError: Under "later", a gradient reached a parameter past its layer: no later choice of samples could
                take it back.
        """
        rows = batch if segments is None else documents
        probes: dict[nn.Parameter, Tensor] = {}
        self._kept, self._open = [], True
        if directions is not None:
            probes = self._make_probes(directions, rows)
        keeps, guards = directions is None or gradients == "later", []
        try:
            if gradients == "later":
                guards = [p.register_hook(partial(_refuse, name)) for p, name in self._names.items() if p.requires_grad]  # type: ignore[no-untyped-call]
            for module, forward in self._modules:
                slots = self._slots(module, directions, probes, gradients == "later")
                tap = Tap(self, batch, segments, rows, slots, keeps, gradients is True)
                module._ghostgram = tap  # type: ignore[assignment]
                module.forward = types.MethodType(_or_untapped(forward) if self._pass_over else forward, module)
            yield
        finally:
            self._open = False
            for guard in guards:
                guard.remove()
            for module, _ in self._modules:
                vars(module).pop("forward", None)
                vars(module).pop("_ghostgram", None)

    def dots(self) -> dict[nn.Parameter, Tensor]:
        """parameter -> (rows, K) of the last `samples`; zero for a parameter that no backward reached."""
        return self._dots

    def kept(self) -> Kept:
        """Hands over what the last `samples` kept; see `contract` and `accumulate`."""
        kept, self._kept = self._kept, []
        return kept

    def keep(self, parameter: nn.Parameter, use: Use) -> None:
        """Keeps one use of a parameter; a layer's backward calls it.

        Args:
            parameter: The parameter.
            use: The layer's inputs and gradients there, from which its dots can be taken.
        """
        self._check_open()
        self._kept.append((parameter, use))

    def _slots(
        self,
        module: nn.Module,
        directions: Mapping[nn.Parameter, Tensor] | None,
        probes: Mapping[nn.Parameter, Tensor],
        all_kept: bool,
    ) -> dict[str, Slot]:
        """A slot for each of a module's parameters that is scored, or kept."""
        slots = {}
        for name, p in self._parameters[module].items():
            mark = self._marks.get(p, "")
            if directions is not None and p in probes:
                slots[name] = Slot(directions[p], probes[p], p, mark)
            elif all_kept and p.requires_grad:
                slots[name] = Slot(None, p.new_zeros(0).requires_grad_(), p, mark)
            elif directions is None and mark:
                slots[name] = Slot(None, None, p, mark)
        return slots

    def _make_probes(self, directions: Mapping[nn.Parameter, Tensor], rows: int) -> dict[nn.Parameter, Tensor]:
        """A probe for each scored parameter; its gradient, where autograd adds the dots up, is there from the start."""

        def check_open(grad: Tensor) -> Tensor:
            self._check_open()
            return grad

        probes, self._dots = {}, {}
        for parameter in self.scored:
            if (D := directions.get(parameter)) is None:
                continue
            probe = torch.zeros(rows, D.shape[0], dtype=D.dtype, device=D.device)
            self._dots[parameter] = probe.grad = torch.zeros_like(probe)
            probes[parameter] = probe.requires_grad_()
            probe.register_hook(check_open)  # type: ignore[no-untyped-call]
        return probes

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError(
                "backward ran after its scoring step was closed: call it inside `with shapley.step(...)`"
            )

    @staticmethod
    @torch.no_grad()
    def contract(kept: Kept, directions: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The dots of uses kept by a `samples` without directions.

        Args:
            kept: What `kept` handed over.
            directions: (K, *parameter.shape) by parameter; uses of others are passed over.

        Returns:
            parameter -> (rows, K), summed over its uses.
        """
        dots: dict[nn.Parameter, Tensor] = {}
        for parameter, use in kept:
            if parameter in directions:
                more = use.dots(whole(directions[parameter]))
                dots[parameter] = dots[parameter] + more if parameter in dots else more
        return dots


def _or_untapped(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The tapped forward, or the module's own where the input has no sample axis."""

    def tapped(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return forward(module, *args, **kwargs)
        except NoSampleAxisError:
            tap = tap_of(module)
            tap.taps.passed_over |= {s.parameter: None for s in tap.slots.values() if s.parameter is not None}
            return type(module).forward(module, *args, **kwargs)  # type: ignore[no-any-return]

    return tapped


def _refuse(name: str, grad: Tensor) -> Tensor:
    raise RuntimeError(
        f"{name}: a gradient reached it past its layer's forward (an argument of a function? a penalty on weights?), "
        "where it cannot be re-weighted by sample"
    )


def tap_of(module: nn.Module) -> Tap:
    """The tap that a tapped forward belongs to."""
    return module._ghostgram  # type: ignore[return-value]


# What a tapped layer's autograd.Function does with the arguments of `Tap.scoring`. ---------------------------------


SCORING = 9
"""How many they are."""


def save_scoring(ctx: Any, scoring: tuple[Any, ...], *tensors: Tensor | None) -> None:
    """Saves a layer's tensors and, behind them, the directions of weight and bias and the segments.

    A backward reads them by `saved`.
    """
    D_weight, _, of_weight, D_bias, _, of_bias, segments, ctx.rows, ctx.later = scoring
    ctx.read = of_weight, of_bias
    ctx.save_for_backward(*tensors, D_weight, D_bias, segments)


def saved(ctx: Any) -> tuple[Any, ...]:
    """What `save_scoring` saved, of the directions the rows that were read of weight and bias.

    Those of a sharded parameter are gathered here, for one backward. To be called once only: checkpointing refuses to
    read `ctx.saved_tensors` a second time.
    """
    *tensors, D_weight, D_bias, segments = ctx.saved_tensors
    D_weight, D_bias = (
        D if D is None or rows is None else D[:, slice(*rows)]
        for D, rows in zip((whole(D_weight), whole(D_bias)), ctx.read, strict=True)
    )
    return *tensors, D_weight, D_bias, segments


def keep(ctx: Any, of_weight: Callable[[], Use], of_bias: Callable[[], Use] | None = None) -> None:
    """Keeps one use of weight and bias, if their directions or the weights of samples come later."""
    if ctx.later is not None:
        tap, weight, bias = ctx.later
        weight.keep(tap.taps, of_weight)
        if of_bias is not None:
            bias.keep(tap.taps, of_bias)


def scores(dots_weight: Tensor | None, dots_bias: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of `Tap.scoring`: dots for probes, nothing for the others."""
    return None, dots_weight, None, None, dots_bias, None, None, None, None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would run a matrix product on x in, or None outside autocast."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)
