"""One training run, by one process or by several that share its batches: the settings under which they must agree."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ghostgram as gg
from algorithms.models import Small, language_model, lm_loss, mse, regression, sentences

ROWS, STEPS = 8, 3


@dataclass(frozen=True)
class Setting:
    """What a run is made of; `wrapped` says for which ways to spread it."""

    model: str = "gpt2 tied"
    dtype: torch.dtype = torch.float64
    optimizer: type = torch.optim.AdamW
    pieces: int = 1  # microbatches of a step
    clip: float | None = None
    options: dict = field(default_factory=dict)  # of InRunShapley
    wrapper: dict = field(default_factory=dict)  # of DistributedDataParallel
    spread: tuple = ("ddp", "fsdp")
    keeps_zeros: bool = False  # zero_grad(set_to_none=False)
    eps: float = 1e-8

    @property
    def shares(self):
        """Whether the losses give every sample's share."""
        return self.options.get("late") == "forward" or "audit_every" in self.options or "fallback" in self.options


SETTINGS = {
    "sgd": Setting("small", optimizer=torch.optim.SGD),
    "adamw": Setting(clip=0.5),
    "adamw in float32": Setting(dtype=torch.float32, clip=0.5, eps=1e-3),
    "adamw, accumulated": Setting(pieces=2),
    "llama": Setting("llama"),
    "after the batch, stored": Setting("small", optimizer=torch.optim.Adam, options={"v_state": "post"}),
    "refreshed, some excluded": Setting(options={"refresh": 2, "exclude": ["transformer.h.0.*", "*wpe*"]}),
    "rotating pool": Setting("small", options={"order": 2}),
    "order 2, stored": Setting(options={"order": 2, "late": "stored", "compare_orders": True}, clip=0.5),
    "order 2 in float32": Setting(options={"order": 2, "late": "stored"}, dtype=torch.float32, eps=1e-3),
    "order 2, replayed": Setting(options={"order": 2, "late": "replay"}),
    "order 2, replayed microbatches": Setting(options={"order": 2}, pieces=2, clip=0.5),
    "order 2, hessian": Setting("small", options={"order": 2, "curvature": "hvp"}, spread=("ddp",)),
    "order 2, forward": Setting("small", options={"order": 2, "late": "forward"}, spread=("ddp",)),
    "audited": Setting("small", options={"audit_every": 2}, spread=("ddp",)),
    "fallback": Setting("bare", options={"fallback": "jvp"}, spread=("ddp",)),
    "gradients as bucket views": Setting(
        options={"order": 2}, pieces=2, clip=0.5, wrapper={"gradient_as_bucket_view": True}, spread=("ddp",)
    ),
    "bucket views kept": Setting(
        options={"order": 2, "late": "replay"}, wrapper={"gradient_as_bucket_view": True}, spread=("ddp",),
        keeps_zeros=True,
    ),
    "static graph": Setting(options={"order": 2, "late": "replay"}, wrapper={"static_graph": True}, spread=("ddp",)),
    "unused looked for": Setting(
        options={"order": 2, "late": "replay"}, wrapper={"find_unused_parameters": True}, spread=("ddp",)
    ),
}  # fmt: skip


class Bare(Small):
    """A model with a parameter that belongs to no layer."""

    def __init__(self, dtype):
        super().__init__(dtype)
        self.gain = nn.Parameter(torch.ones(5, dtype=dtype))

    def forward(self, x):
        return super().forward(self.gain * x)


def build(setting):
    """(model, loss(model, rows of a batch), batch(number, rows))."""
    if setting.model in ("small", "bare"):
        model = (Small if setting.model == "small" else Bare)(setting.dtype)
        return model, mse, lambda count, seed: regression(count, seed, setting.dtype)
    return language_model(setting.model, setting.dtype), lm_loss, sentences


def spread_out(model, how, wrapper):
    """The model as `how` spreads it over processes."""
    if how == "ddp":
        return DistributedDataParallel(model, **wrapper)
    if how == "fsdp":
        alone = {"Conv1D", "LlamaRMSNorm"}  # of one such layer the parameters are a group of their own, a block's another
        layers = [m for m in model.modules() if type(m).__name__ in alone][:1]
        blocks = [m for name, m in model.named_modules() if name in ("up", "transformer.h.0", "model.layers.0")]
        for module in layers + blocks:
            fully_shard(module, **wrapper)
        fully_shard(model, **wrapper)
    return model


def cut(batch, part, parts):
    """The rows of a batch that one of several parts has."""
    if isinstance(batch, tuple):
        return tuple(cut(each, part, parts) for each in batch)
    return batch.chunk(parts)[part]


def synchronised(model, last):
    """Around a microbatch: gradients are averaged over processes after the last one alone."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return nullcontext()


def run(setting, how="alone", log=None, steps=STEPS):
    """Trains; what it found, as {"phi": {(step, id): [...]}, "ledger": rows, "weights": {...}}."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if how != "alone" else (0, 1)
    net, loss, batches = build(setting)
    model = spread_out(net, how, setting.wrapper)
    options = {} if setting.optimizer is torch.optim.SGD else {"eps": setting.eps}
    optimizer = setting.optimizer(model.parameters(), lr=0.02, weight_decay=0.1, **options)
    whole, parted = batches(4, 101), batches(ROWS, 102)
    sets = {"whole": lambda m: loss(m, whole), "parted": lambda m: loss(m, cut(parted, rank, size))}
    shapley = gg.InRunShapley(model, optimizer, sets, log=log, **setting.options)
    for number in range(steps):
        batch, ids = cut(batches(ROWS, number), rank, size), torch.arange(ROWS).chunk(size)[rank] + ROWS * number
        with shapley.step():
            for piece in range(setting.pieces):
                rows = cut(batch, piece, setting.pieces)

                def losses(rows=rows, shares=setting.shares):
                    if shares:
                        return (model(rows[0]) - rows[1]).square() / len(batch[1])
                    return loss(model, rows) / setting.pieces

                with synchronised(model, piece == setting.pieces - 1):
                    with shapley.samples(cut(ids, piece, setting.pieces), losses):
                        losses().sum().backward()
        if setting.clip:
            nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not setting.keeps_zeros)
    ledger = shapley.ledger().to_pylist()
    shapley.close()
    rows = shapley.step_log().to_pylist()
    phi = {(r["step"], r["sample_id"]): [v for k, v in r.items() if k.startswith("phi")] for r in rows}
    assert {r["rank"] for r in rows} == {rank}
    weights = {name: _whole(p).detach().clone() for name, p in net.named_parameters()}
    return {"phi": phi, "ledger": ledger, "weights": weights}


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
