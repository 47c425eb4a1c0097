"""Losses, gradients and curvature of the validation sets, leaving training as it was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghostgram.training.aside import evaluating, taken_gradients
from ghostgram.training.ranks import Ranks

Validation = Callable[[nn.Module], Tensor]
Gradient = dict[nn.Parameter, Tensor]


class RotatingPool:
    """A validation set of which every step reads another part, so that no one sequence decides all signs.

    Give it as a validation set. Parts are cut from seeded permutations of the pool, one after another, so that every
    sequence has its turn before any has its second. A step's change of loss is measured on the part that it was scored
    with, which takes one more forward per step than a fixed set.

    Args:
        loss: (model, indices) -> scalar loss of those members of the pool; indices is an int64 tensor (take,).
        size: Members of the pool.
        take: Members that a step reads; must not exceed size.
        seed: Of the permutations.

    Raises:
        ValueError: take is not between 1 and size.
    """

    def __init__(self, loss: Callable[[nn.Module, Tensor], Tensor], size: int, take: int, seed: int = 0) -> None:
        if not 1 <= take <= size:
            raise ValueError(f"take: expected 1 to size = {size}, got {take}")
        self._loss, self._size, self._take, self._seed = loss, size, take, seed
        self._indices = self.part(0)

    def part(self, step: int) -> Tensor:
        """The members that a step reads, (take,) int64."""
        turns = self._size // self._take  # parts per permutation; what is left over waits for the next one
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step // turns)
        start = step % turns * self._take
        return torch.randperm(self._size, generator=generator)[start : start + self._take]

    def turn_to(self, step: int) -> None:
        """Makes the pool read the part of a step."""
        self._indices = self.part(step)

    def __call__(self, model: nn.Module) -> Tensor:
        """The loss of the part turned to."""
        return self._loss(model, self._indices)


class ValidationSets:
    """K named validation sets, evaluated in evaluation mode with random states, modes and .grad left as found.

    Losses, gradients and products are means over the ranks; of sharded parameters, the parts that this process holds.
    """

    def __init__(self, sets: Validation | Mapping[str, Validation], ranks: Ranks) -> None:
        if not callable(sets) and not sets:
            raise ValueError("validation: expected a callable or at least one named callable, got an empty mapping")
        self._sets = {"validation": sets} if callable(sets) else dict(sets)
        self._ranks = ranks
        self.rotates = any(isinstance(each, RotatingPool) for each in self._sets.values())

    @property
    def names(self) -> list[str]:
        """The names of the sets, in order."""
        return list(self._sets)

    def turn_to(self, step: int) -> None:
        """Makes rotating pools read the part of a step."""
        for each in self._sets.values():
            if isinstance(each, RotatingPool):
                each.turn_to(step)

    def losses(self, model: nn.Module) -> Tensor:
        """(K,) float64 losses, without gradients."""
        with evaluating(model, []), self._ranks.aside(), torch.no_grad():
            losses = torch.stack([_scalar(name, loss(model)).double().cpu() for name, loss in self._sets.items()])
        return self._ranks.mean(losses)

    def gradients(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, list[Gradient]]:
        """(K,) float64 losses, and for every set the gradient of its loss by parameter (zero where it has none)."""
        losses, gradients = [], []
        with evaluating(model, parameters), self._ranks.aside(), torch.enable_grad():
            for name, function in self._sets.items():
                loss = _scalar(name, function(model))
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach().double().cpu())
                gradients.append(self._ranks.averaged(taken_gradients(parameters)))
        return self._ranks.mean(torch.stack(losses)), gradients

    def curvature(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], vectors: Sequence[Mapping[nn.Parameter, Tensor]]
    ) -> tuple[list[Gradient], list[list[Gradient]]]:
        """For every set its gradient, and its Hessian times each vector.

        Pins the math attention kernel: the others have no second derivative.
        """
        gradients, products = [], []
        math = sdpa_kernel(SDPBackend.MATH)
        with evaluating(model, parameters), self._ranks.aside(), torch.enable_grad(), math:
            for name, function in self._sets.items():
                loss = _scalar(name, function(model))
                try:
                    grads = _differentiated(loss, parameters, None, create_graph=True)
                    along = [_differentiated(grads, parameters, [v[p] for p in parameters]) for v in vectors]
                except RuntimeError as error:
                    raise RuntimeError(
                        f"validation[{name!r}] cannot be differentiated twice ({error}): use curvature='midpoint', "
                        "which needs first derivatives alone"
                    ) from error
                gradients.append(self._ranks.averaged({p: g.detach() for p, g in zip(parameters, grads, strict=True)}))
                products.append([self._ranks.averaged(dict(zip(parameters, each, strict=True))) for each in along])
        return gradients, products


def _differentiated(
    outputs: Tensor | Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    along: Sequence[Tensor] | None,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """autograd.grad that leaves the graph for another one; zero for what the outputs do not depend on."""
    return torch.autograd.grad(
        outputs, parameters, along, retain_graph=True, create_graph=create_graph, allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip


def _scalar(name: str, loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"validation[{name!r}]: expected a scalar loss tensor, got {what}")
    return loss
