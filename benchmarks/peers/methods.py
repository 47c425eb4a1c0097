"""The model of the comparison, the exact values, and every way that is compared.

A method is built once for a copy of the model and then called with ids (B, T + 1): forward, backward and whatever the
method does to tell samples apart. All of them see the same untied model with contiguous ids and positions, because
that is what every peer can run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tiny_lm import Block
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import ghostgram as gg

WIDTH, LAYERS, HEADS, VOCABULARY = 768, 4, 12, 8192
STEP = 1e-9  # SGD's: too small to move a float32 weight, so that every round meets the same model


class Model(nn.Module):
    """A GPT-2 in plain torch: ids (B, T) in, logits (B, T, V) out; no weight is used twice."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(context, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        x = self.token(ids) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def losses(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """(B,): each sample's mean next-token cross-entropy."""
    logits = model(ids[:, :-1].contiguous())
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def sample_gradient(model: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
    """The gradient of one sample's loss, parameter by parameter."""
    return torch.autograd.grad(losses(model, ids).sum(), list(model.parameters()))


def exact_grams(model: nn.Module, ids: Tensor, validation: Tensor) -> dict[str, Tensor]:
    """For every parameter the Gram matrix (B + 1, B + 1) of the samples' gradients, the last one the validation's.

    Gradients come one sample at a time from autograd in float32, their products are summed in float64.
    """
    gradients = [sample_gradient(model, rows) for rows in (*ids.split(1), validation)]
    grams = {}
    for (name, parameter), rows in zip(model.named_parameters(), zip(*gradients, strict=True), strict=True):
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for first in range(0, parameter.numel(), 1 << 18):
            part = torch.stack([row.flatten()[first : first + (1 << 18)] for row in rows]).double()
            gram += part @ part.T
        grams[name] = gram
    return grams


# Plain training, and what needs no package but torch ---------------------------------------------------------------


def plain(model: nn.Module, validation: Tensor) -> Callable[[Tensor], None]:
    return lambda ids: losses(model, ids).sum().backward()


def validation_pass(model: nn.Module, validation: Tensor) -> Callable[[Tensor], None]:
    return lambda ids: losses(model, validation).sum().backward()


def one_at_a_time(model: nn.Module, validation: Tensor) -> Callable[[Tensor], Tensor]:
    def norms(ids: Tensor) -> Tensor:
        squares = [sum(g.pow(2).sum() for g in sample_gradient(model, row)) for row in ids.split(1)]
        return torch.stack(squares).sqrt()

    return norms


def _functional(model: nn.Module) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor], Tensor], Tensor]]:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return parameters, lambda values, ids: losses(lambda x: functional_call(model, values, (x,)), ids)


def vmap_norms(model: nn.Module, validation: Tensor) -> Callable[[Tensor], Tensor]:
    parameters, loss = _functional(model)
    gradients = vmap(grad(lambda values, row: loss(values, row[None]).sum()), in_dims=(None, 0))

    def norms(ids: Tensor) -> Tensor:
        return sum(g.flatten(1).pow(2).sum(1) for g in gradients(parameters, ids).values()).sqrt()

    return norms


def jvp_dots(model: nn.Module, validation: Tensor) -> Callable[[Tensor], Tensor]:
    """One forward-mode pass in the direction of the validation gradient, which is not part of what is timed."""
    parameters, loss = _functional(model)
    direction = dict(zip(parameters, sample_gradient(model, validation), strict=True))

    def dots(ids: Tensor) -> Tensor:
        # Forward mode knows only the attention that is written out.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return jvp(lambda values: loss(values, ids), (parameters,), (direction,))[1]

    return dots


# Ours ---------------------------------------------------------------------------------------------------------------


class Hooked:
    """The model's layers with hooks on their outputs; Linear and LayerNorm leave their gradients to the hooks."""

    def __init__(self, model: nn.Module, take: Callable[[nn.Module, Tensor, Tensor], Tensor | None]) -> None:
        self.model, self.take = model, take
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                layer.requires_grad_(False)
            if isinstance(layer, nn.Linear | nn.LayerNorm | nn.Embedding):
                layer.register_forward_hook(self._watch)

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(partial(self._taken, layer, inputs[0].detach()))

    def _taken(self, layer: nn.Module, x: Tensor, b: Tensor) -> None:
        part = self.take(layer, x, b)
        if part is not None:
            self.total = self.total + part

    def __call__(self, ids: Tensor) -> Tensor:
        self.total = torch.zeros(())
        losses(self.model, ids).sum().backward()
        return self.total


def _squares(layer: nn.Module, x: Tensor, b: Tensor) -> Tensor:
    """||g_i||^2 of a layer's parameters, whose gradients come out of the same passes."""
    if isinstance(layer, nn.Embedding):  # the table's gradient stays autograd's
        return gg.embedding_stats(x, b).norms ** 2
    if isinstance(layer, nn.LayerNorm):
        _, mean, rstd = torch.native_layer_norm(x, layer.normalized_shape, None, None, layer.eps)
        affine = gg.affine_stats(b, x, mean.squeeze(-1), rstd.squeeze(-1))
        layer.weight.grad, layer.bias.grad = affine.weight_grad, affine.bias_grad
        return affine.weight_norms**2 + affine.bias_norms**2
    stats = gg.grad_stats(x, b)
    layer.weight.grad = stats.weight_grad
    if layer.bias is None:
        return stats.norms**2
    bias = gg.affine_stats(b)
    layer.bias.grad = bias.bias_grad
    return stats.norms**2 + bias.bias_norms**2


def our_norms(model: nn.Module, validation: Tensor) -> Callable[[Tensor], Tensor]:
    hooked = Hooked(model, _squares)
    return lambda ids: hooked(ids).sqrt()


def our_gram(model: nn.Module, validation: Tensor) -> Callable[[Tensor], Tensor]:
    return Hooked(model, lambda layer, x, b: gg.grad_gram(x, b) if isinstance(layer, nn.Linear) else None)


def in_run_shapley(model: nn.Module, validation: Tensor) -> Callable[[Tensor], Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), STEP)
    shapley = gg.InRunShapley(model, optimizer, {"one": lambda trained: losses(trained, validation).sum()})

    def dots(ids: Tensor) -> Tensor:
        with shapley.step(ids=list(range(len(ids)))):
            losses(model, ids).sum().backward()
        optimizer.step()
        phi = shapley.step_log()["phi_one"].to_pylist()[-len(ids) :]
        return torch.tensor(phi, dtype=torch.float64) / -STEP

    return dots


# Peers --------------------------------------------------------------------------------------------------------------


def opacus_norms(model: nn.Module, validation: Tensor) -> Callable[[Tensor], Tensor]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping as Ghost

    ghost = Ghost(model, loss_reduction="sum", use_ghost_clipping=True).train()

    def norms(ids: Tensor) -> Tensor:
        losses(ghost, ids).sum().backward()
        found = ghost.get_norm_sample().detach()
        for parameter in ghost.parameters():
            parameter._norm_sample = None
        return found

    return norms


def backpack_norms(model: nn.Module, validation: Tensor) -> Callable[[Tensor], Tensor]:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            extend(layer)

    def norms(ids: Tensor) -> Tensor:
        with backpack(BatchL2Grad()):
            losses(model, ids).sum().backward()
        squares = [parameter.batch_l2 for parameter in model.parameters() if hasattr(parameter, "batch_l2")]
        return sum(squares).sqrt()

    return norms


def torchjd_gram(model: nn.Module, validation: Tensor) -> Callable[[Tensor], Tensor]:
    from torchjd.autogram import Engine

    engine = Engine(model, batch_dim=0)
    return lambda ids: engine.compute_gramian(losses(model, ids))


def dattri_gram(model: nn.Module, validation: Tensor) -> Callable[[Tensor], Tensor]:
    from dattri.task import AttributionTask

    _, loss = _functional(model)
    task = AttributionTask(
        loss_func=lambda values, data: loss(values, data[0].reshape(-1, data[0].shape[-1])).sum(),
        model=model,
        checkpoints=model.state_dict(),
    )
    # Split by layer: of one flat vector of all parameters it would form a zero-padded gradient per parameter.
    values, _ = task.get_param(ckpt_idx=0, layer_split=True)
    gradients = task.get_grad_loss_func(in_dims=(None, 0))

    def gram(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return sum(g.flatten(1) @ g.flatten(1).T for g in gradients(tuple(values), (ids,)))

    return gram


# What is compared ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One way to a result of its task: "norms" (B,), "gram" (B, B) or "dots" (B,), or to no result."""

    name: str
    build: Callable[[nn.Module, Tensor], Callable[[Tensor], Any]]
    does: str
    package: str = "torch"
    covers: tuple[type, ...] = (nn.Linear, nn.LayerNorm, nn.Embedding)
    biases: bool = True
    beside: tuple[str, ...] = ()
    """Methods that a training step needs beside this one, when it is a pass of its own."""

    def covered(self, model: nn.Module) -> list[str]:
        """Names of the parameters that the result is about."""
        return [
            f"{path}.{name}"
            for path, layer in model.named_modules()
            if isinstance(layer, self.covers)
            for name, _ in layer.named_parameters(recurse=False)
            if self.biases or name != "bias"
        ]


PLAIN = Method("plain", plain, "forward and backward: the sum's gradient, nothing per sample")
TASKS: dict[str, list[Method]] = {
    "norms": [
        Method("ghostgram", our_norms, "gradients and norms, from hooks that call the primitives", "ghostgram"),
        Method("Opacus", opacus_norms, "gradients and norms, ghost clipping's first backward", "opacus"),
        Method(
            "BackPACK",
            backpack_norms,
            "gradients and norms, without LayerNorm",
            "backpack-for-pytorch",
            covers=(nn.Linear, nn.Embedding),
        ),
        Method("torch.func vmap", vmap_norms, "norms of gradients of every sample, all stored"),
        Method("one at a time", one_at_a_time, "norms, a backward per sample"),
    ],
    "gram": [
        Method(
            "ghostgram",
            our_gram,
            "Gram of Linear weights alone, from hooks that call grad_gram",
            "ghostgram",
            covers=(nn.Linear,),
            biases=False,
        ),
        Method("TorchJD", torchjd_gram, "Gram, a Jacobian per module", "torchjd"),
        Method("dattri", dattri_gram, "Gram of gradients of every sample, all stored", "dattri"),
    ],
    "dots": [
        Method("validation pass", validation_pass, "one sequence's forward and backward, nothing per sample"),
        Method("ghostgram", in_run_shapley, "InRunShapley: gradients, dots, validation pass, SGD's step", "ghostgram"),
        Method(
            "torch.func jvp",
            jvp_dots,
            "dots by forward mode; times of plain and of the validation pass are added",
            beside=("plain", "validation pass"),
        ),
    ],
}


def expected(method: Method, task: str, grams: dict[str, Tensor], names: Iterable[str]) -> Tensor:
    """The exact result over some parameters."""
    gram = torch.stack([grams[name] for name in names]).sum(0)
    if task == "dots":
        return gram[:-1, -1]
    return gram[:-1, :-1].diagonal().sqrt() if task == "norms" else gram[:-1, :-1]


def relative_error(result: Tensor, exact: Tensor) -> float:
    """max |result - exact| / max |exact|."""
    return float((result.double() - exact).abs().max() / exact.abs().max())


def copied(model: nn.Module) -> nn.Module:
    """A model of its own for every method: hooks and wrappers stay apart."""
    return copy.deepcopy(model)
