"""A training step of GPT-2 small in bfloat16 autocast: plain, with In-Run Data Shapley, and as GhostSuite does it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tiny_lm import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ghostgram as gg

# The vocabulary is padded to a multiple of 64, as everyone pads it who wants tensor cores in the head.
SMALL = {"vocabulary": 50304, "context": 1024, "width": 768, "layers": 12, "heads": 12}
TINY = {"vocabulary": 11, "context": 6, "width": 8, "layers": 1, "heads": 2}


class Gpt(nn.Module):
    """ids (B, T) in, logits (B, T, V) out; the head is the table of tokens, as in GPT-2."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def _trained(device: str, sizes: dict[str, int]) -> tuple[Gpt, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Gpt(**sizes).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, foreach=True)


def plain(device: str, sizes: dict[str, int], ids: Tensor, _: Tensor) -> Callable[[], Any]:
    model, optimizer = _trained(device, sizes)

    def step() -> None:
        loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def scored(device: str, sizes: dict[str, int], ids: Tensor, validation: Tensor) -> Callable[[], Any]:
    model, optimizer = _trained(device, sizes)
    shapley = gg.InRunShapley(model, optimizer, partial(loss, ids=validation))

    def step() -> None:
        with shapley.step(ids=range(len(ids))):
            loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ghost_suite(device: str, sizes: dict[str, int], ids: Tensor, validation: Tensor) -> Callable[[], Any]:
    """GhostSuite's: training and validation samples in one batch, dots of Linear layers by products of tokens."""
    model, optimizer = _trained(device, sizes)
    both, count = torch.cat([ids, validation]), len(ids)
    dots = torch.zeros(count, device=device)

    def watch(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(partial(taken, inputs[0].detach().to(output.dtype)))

    def taken(a: Tensor, b: Tensor) -> None:
        products = a[:count] @ a[count:].flatten(0, 1).T
        products *= b[:count] @ b[count:].flatten(0, 1).T
        dots.add_(products.sum((1, 2), dtype=torch.float32))

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(watch)

    def step() -> None:
        dots.zero_()
        loss(model, both).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class _Operators(TorchDispatchMode):
    """Counts what the host launches: operators that are no views and do more than allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator._schema.name
        self.count += not (operator.is_view or "view" in name or "empty" in name)
        return operator(*args, **(kwargs or {}))


def operators(call: Callable[[], Any]) -> int:
    """How many operators a call launches."""
    with _Operators() as seen:
        call()
    return seen.count


STEPS = {"plain": plain, "In-Run Shapley": scored, "GhostSuite's scheme": ghost_suite}


def batch(device: str, sizes: dict[str, int], samples: int) -> tuple[Tensor, Tensor]:
    """Random tokens to train on, and one sample to validate with."""
    torch.manual_seed(1)
    ids = torch.randint(sizes["vocabulary"], (samples + 1, sizes["context"] + 1), device=device)
    return ids[:samples], ids[samples:]
