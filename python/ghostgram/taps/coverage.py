"""Which parameters of a model the taps cover, and why the others are not."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ghostgram.taps.recognise import Forward, Tapped, tap_for


class UncoveredParameterError(ValueError):
    """A trainable parameter has no tap; the message names it and says why."""


@dataclass(frozen=True)
class Row:
    """One trainable parameter in the coverage table."""

    name: str
    numel: int
    covered_by: str
    """The kind of layer that taps it, "excluded", or "fallback" with the reason."""


@dataclass(frozen=True)
class Coverage:
    """What `cover` found."""

    rows: list[Row]
    """Every trainable parameter, with what covers it; printed as a table."""
    scored: dict[str, nn.Parameter]
    """Parameters whose per-sample dots taps take, by name; a tied parameter under its first name."""
    excluded: dict[str, nn.Parameter]
    """Parameters that `exclude` leaves out of the scores."""
    fallback: dict[str, nn.Parameter]
    """Parameters without a tap, left to a derivative of the samples' losses; empty unless `fallback="jvp"`."""
    tapped: list[tuple[nn.Module, Forward]]
    """Modules to tap, each with its tapped forward."""

    def demote(self, names: Sequence[str], reason: str) -> None:
        """Leaves scored parameters to the fallback.

        Args:
            names: Those parameters, as in `scored`.
            reason: What the table says of them.
        """
        for name in names:
            self.fallback[name] = self.scored.pop(name)
        found = f"fallback ({reason})"
        self.rows[:] = [replace(row, covered_by=found) if row.name in names else row for row in self.rows]

    def table(self) -> str:
        """Every trainable parameter as a line of text: name, elements, their share of all, what covers it."""
        total = max(1, sum(row.numel for row in self.rows))
        kinds: Counter[str] = Counter()
        for row in self.rows:
            kinds[row.covered_by.partition(" ")[0]] += row.numel
        cells = [("parameter", "elements", "share", "covered by")]
        cells += [(row.name, f"{row.numel:,}", f"{row.numel / total:.1%}", row.covered_by) for row in self.rows]
        cells += [("all", f"{n:,}", f"{n / total:.1%}", kind) for kind, n in kinds.most_common()]
        wide = [max(len(line[column]) for line in cells) for column in range(3)]
        return "\n".join(
            f"{name:<{wide[0]}}  {numel:>{wide[1]}}  {share:>{wide[2]}}  {by}" for name, numel, share, by in cells
        )

    __str__ = table


def cover(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    exclude: Sequence[str] = (),
    fallback: str = "error",
) -> Coverage:
    """Finds a tap for every parameter given, or raises an error that names those without one.

    Args:
        model: The model whose modules are looked at.
        parameters: The trainable parameters that must be covered.
        exclude: Names or shell patterns of parameters to leave out of the scores.
        fallback: What becomes of a parameter without a tap: "error", or "jvp" to name it in `Coverage.fallback`.

    Returns:
        Every parameter in one of `scored`, `excluded` and `fallback`, and the modules to tap.

    Raises:
        UncoveredParameterError: Some parameter belongs to no layer with a tap, and fallback is "error".
        ValueError: A pattern of `exclude` matches nothing, a parameter is not the model's, or fallback is neither.
    """
    if fallback not in ("error", "jvp"):
        raise ValueError(f"fallback: expected 'error' or 'jvp', got {fallback!r}")
    wanted = set(parameters)
    uses: dict[nn.Parameter, list[_Use]] = {}
    for use in _uses(model):
        if use.parameter in wanted:
            uses.setdefault(use.parameter, []).append(use)
    if missing := len(wanted - uses.keys()):
        raise ValueError(f"parameters: {missing} of the optimizer's parameters do not belong to the model")
    for pattern in exclude:
        if not any(fnmatch.fnmatch(use.alias, pattern) for each in uses.values() for use in each):
            raise ValueError(f"exclude: {pattern!r} matches no trainable parameter")

    found = Coverage([], {}, {}, {}, [])
    sequence_first, taps = _sequence_first(model), {}
    forwards: dict[nn.Module, Forward] = {}
    problems = []
    for parameter, of_parameter in uses.items():
        name, covered_by, reasons = of_parameter[0].alias, "", []
        for use in of_parameter:
            if use.module not in taps:
                taps[use.module] = tap_for(use.module)
            if (reason := _why_not(taps[use.module], use)) and not _holds(use, of_parameter):
                reasons.append((use.alias, reason))
        if any(fnmatch.fnmatch(use.alias, pattern) for use in of_parameter for pattern in exclude):
            found.excluded[name], covered_by = parameter, "excluded"
        elif reasons:
            found.fallback[name], covered_by = parameter, f"fallback ({reasons[0][1]})"
            problems += [f"{alias} ({reason})" for alias, reason in reasons]
        else:
            found.scored[name] = parameter
            for use in of_parameter:
                if isinstance(tapped := taps[use.module], Tapped) and use.name in tapped.parameters:
                    covered_by = covered_by or type(use.module).__name__
                    forwards[use.module] = _swapped(tapped.forward) if use.module in sequence_first else tapped.forward
        found.rows.append(Row(name, parameter.numel(), covered_by))
    if problems and fallback == "error":
        raise UncoveredParameterError(
            "no tap covers these trainable parameters: " + "; ".join(problems) + ". Freeze them, leave them out of "
            "the scores by name with exclude=[...] (their joint effect is then reported as `uncovered`), or have their "
            'dots computed from the samples\' losses with fallback="jvp"'
        )
    found.tapped.extend(forwards.items())
    return found


@dataclass(frozen=True)
class _Use:
    """A parameter in a module that reads it."""

    parameter: nn.Parameter
    module: nn.Module
    name: str
    """Its name in the module."""
    alias: str
    """Its name in the model."""


def _uses(model: nn.Module) -> Iterator[_Use]:
    for path, module in model.named_modules():
        path = path.replace("_orig_mod.", "").removesuffix("_orig_mod")  # which torch.compile puts in
        # Attention reads the parameters of its out_proj without calling that.
        for name, parameter in module.named_parameters(recurse=isinstance(module, nn.MultiheadAttention)):
            yield _Use(parameter, module, name, f"{path}.{name}" if path else name)


def _why_not(tap: Tapped | str, use: _Use) -> str | None:
    """Why a tap does not score this use of a parameter, if so."""
    if use.alias.endswith("relative_attention_bias.weight"):  # of T5 and its kin
        return "its rows are of pairs of positions, added up over samples before they reach it"
    if isinstance(tap, str):
        return tap
    if use.name not in tap.parameters:
        return f"{type(use.module).__name__} has a tap, but not for {use.name}"
    return None


def _holds(use: _Use, uses: Sequence[_Use]) -> bool:
    """Whether a module only keeps a parameter that a layer inside it reads, as Hugging Face's heads keep a bias.

    Should it read the parameter itself nevertheless, the sum of dots will not be that of the gradient.
    """
    inside = use.alias.removesuffix(use.name)
    return "." not in use.name and any(u.module is not use.module and u.alias.startswith(inside) for u in uses)


def _sequence_first(model: nn.Module) -> set[nn.Module]:
    """The layers of torch's Transformers without batch_first: the sample is on axis 1 of what goes in and out."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
            attention, layers = module.layers[0].self_attn, [module.norm]
        elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            attention = module.self_attn
            layers = [child for child in module.children() if not isinstance(child, nn.MultiheadAttention)]
        else:
            continue
        if not attention.batch_first:
            found.update(layer for layer in layers if layer is not None)
    return found


def _swapped(forward: Forward) -> Forward:
    """A tapped forward for an input and output (T, B, features)."""

    def swapped(module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = forward(module, x.transpose(0, 1))
        return y.transpose(0, 1)

    return swapped
