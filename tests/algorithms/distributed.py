"""One training run, by one process or by several that share its batches: the settings under which they must agree."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision

import ghostgram as gg
from algorithms.models import Small, language_model, lm_loss, mse, regression, sentences

ROWS, STEPS = 8, 3


@dataclass(frozen=True)
class Setting:
    """What a run is made of; `spread` says in which ways it can be spread over processes."""

    model: str = "gpt2 tied"
    dtype: torch.dtype = torch.float64
    optimizer: type = torch.optim.AdamW
    pieces: int = 1  # microbatches of a step
    clip: float | None = None
    options: dict = field(default_factory=dict)  # of InRunShapley
    wrapper: dict = field(default_factory=dict)  # of DistributedDataParallel or fully_shard
    spread: tuple = ("ddp", "fsdp")
    keeps_zeros: bool = False  # zero_grad(set_to_none=False)
    eps: float = 1e-8  # of Adam: in float32 its first step makes noise as large as gradients

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
    "order 2": Setting("small", options={"order": 2}),
    "order 2, stored": Setting(options={"order": 2, "late": "stored", "compare_orders": True}, clip=0.5),
    "order 2 in float32": Setting(options={"order": 2, "late": "stored"}, dtype=torch.float32, eps=1e-3),
    "order 2, replayed": Setting(options={"order": 2, "late": "replay"}),
    "order 2, replayed microbatches": Setting(options={"order": 2}, pieces=2, clip=0.5),
    "order 2, hessian": Setting("small", options={"order": 2, "curvature": "hvp"}, spread=("ddp",)),
    "order 2, forward": Setting("small", options={"order": 2, "late": "forward"}, spread=("ddp",)),
    "audited": Setting("small", options={"audit_every": 2}, spread=("ddp",)),
    "fallback": Setting("bare", options={"fallback": "jvp"}, spread=("ddp",)),
    "fallback, of uses of one rank": Setting("lopsided", options={"fallback": "jvp"}, spread=("ddp",)),
    "gradients as bucket views": Setting(
        options={"order": 2}, pieces=2, clip=0.5, wrapper={"gradient_as_bucket_view": True}, spread=("ddp",)
    ),
    "bucket views kept": Setting(
        options={"order": 2, "late": "replay"}, wrapper={"gradient_as_bucket_view": True}, spread=("ddp",),
        keeps_zeros=True,
    ),
    "other layers": Setting("assorted", spread=("fsdp",)),
    "sharded in bfloat16": Setting(
        dtype=torch.float32, optimizer=torch.optim.SGD, options={"order": 2, "late": "replay"}, spread=("fsdp",),
        wrapper={"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    ),
    "static graph": Setting(options={"order": 2, "late": "replay"}, wrapper={"static_graph": True}, spread=("ddp",)),
    "unused looked for": Setting(
        options={"order": 2, "late": "replay"}, wrapper={"find_unused_parameters": True}, spread=("ddp",)
    ),
}  # fmt: skip


class Assorted(nn.Module):
    """A model of layers whose dots are taken in other ways than a linear layer's."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.filters, self.widen = nn.Conv1d(1, 6, 3, padding=1), nn.ConvTranspose1d(6, 8, 2)
        self.bags = nn.EmbeddingBag(7, 8, mode="sum")
        self.attend = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)
        self.alone = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gain, self.down = Gain(), nn.Linear(8, 1)
        self.to(dtype)

    def forward(self, x):
        keys = torch.tanh(self.widen(torch.tanh(self.filters(x.unsqueeze(1))))).transpose(1, 2)
        query = self.bags((3 * x.abs()).long().clamp_max(6)).unsqueeze(1)
        mixed = self.attend(query, keys, keys)[0] + self.alone(keys, keys, keys, need_weights=False)[0]
        return self.down(self.gain(mixed).sum(1)).squeeze(-1)


class Gain(nn.Module):
    """A layer with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x):
        return x * self.weight


class Bare(Small):
    """A model with a parameter that belongs to no layer."""

    def __init__(self, dtype):
        super().__init__(dtype)
        self.gain = nn.Parameter(torch.ones(5, dtype=dtype))

    def forward(self, x):
        return super().forward(self.gain * x)


class Lopsided(Small):
    """On one rank alone uses two layers as no tap expects, past a forward and without samples, for the same numbers."""

    def __init__(self, dtype):
        super().__init__(dtype)
        self.table = nn.Embedding(6, 5).to(dtype)

    def forward(self, x):
        ids = torch.tensor([[[0, 2, 3], [3, 4, 4]]])
        if dist.is_initialized() and dist.get_rank() and x.shape[0] == ROWS // 2:
            shifted = x + self.table(ids[0]).mean((0, 1))
            hidden = nn.functional.linear(shifted, self.up.weight, self.up.bias)
        else:
            hidden = self.up(x + self.table(ids.expand(len(x), -1, -1)).mean((1, 2)))
        return self.down(torch.tanh(self.norm(hidden))).squeeze(-1)


def build(setting):
    """(model, loss(model, rows of a batch), batch(number, rows))."""
    if model := {"small": Small, "bare": Bare, "lopsided": Lopsided, "assorted": Assorted}.get(setting.model):
        return model(setting.dtype), mse, lambda count, seed: regression(count, seed, setting.dtype)
    return language_model(setting.model, setting.dtype), lm_loss, sentences


def spread_out(model, how, wrapper):
    """The model as `how` spreads it over processes."""
    if how == "ddp":
        return DistributedDataParallel(model, **wrapper)
    if how == "fsdp":
        alone = {
            "Conv1D",
            "LlamaRMSNorm",
        }  # of one such layer the parameters are a group of their own, a block's another
        layers = [m for m in model.modules() if type(m).__name__ in alone][:1]
        of_a_group = ("up", "transformer.h.0", "model.layers.0", "filters", "attend")
        blocks = [m for name, m in model.named_modules() if name in of_a_group]
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
    """Trains; what it found, as {"phi": {(step, id): [...]}, "ledger": rows, "weights": {...}, "fallback": names}."""
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

                def losses(rows=rows):
                    if setting.shares:
                        return (model(rows[0]) - rows[1]).square() / len(rows[1])
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
    return {"phi": phi, "ledger": ledger, "weights": weights, "fallback": sorted(shapley.coverage().fallback)}


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_all(rank, place, how, names):
    """`run` for several settings, and then what is refused, in one group of processes: each takes seconds to start."""
    found = {name: run(SETTINGS[name], how) for name in names}
    if (how, dist.get_world_size()) == ("ddp", 2):
        found |= {"refusals": refusals(rank), "missed": use_missed_by_taps(rank)}
    return found


def engine(model, trained=None, **options):
    """InRunShapley of a model that will not be run."""
    optimizer = torch.optim.SGD((trained or model).parameters(), lr=0.1)
    return gg.InRunShapley(model, optimizer, lambda m: m(torch.ones(1, 5)).sum(), **options)


def refusals(rank):
    """The messages with which ways to spread a model are refused."""
    mesh = init_device_mesh("cpu", (2,))

    def sharded(**options):
        return lambda: engine(fully_shard(Small(torch.float32), mesh=mesh), **options)

    def half():
        model = Small(torch.float32)
        fully_shard(model.up, mesh=mesh)
        return engine(model)

    def hybrid():
        grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        return engine(fully_shard(Small(torch.float32), mesh=grid))

    ways = {
        "tensor": lambda: engine(parallelize_module(Small(torch.float32), mesh, {"up": ColwiseParallel()})),
        "fsdp 1": lambda: engine(FullyShardedDataParallel(Small(torch.float32), device_id=torch.device("cpu"))),
        "hybrid": hybrid,
        "half": half,
        "inside": lambda: engine(nn.Sequential(DistributedDataParallel(Small(torch.float32)))),
        "mixed": lambda: engine(
            DistributedDataParallel(Small(torch.float32), mixed_precision=_MixedPrecision(torch.bfloat16))
        ),
        "pipeline": lambda: engine(PipelineStage(part := nn.Linear(5, 1), rank, 2, torch.device("cpu")), part),
        "hvp": sharded(order=2, curvature="hvp"),
        "forward": sharded(late="forward"),
        "jvp": sharded(fallback="jvp"),
        "audit": sharded(audit_every=1),
    }
    messages = {}
    for name, way in ways.items():
        try:
            way()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def use_missed_by_taps(rank):
    """The error of a run in which one rank alone uses a weight outside its layer."""
    model = DistributedDataParallel(Small())
    x, y = cut(regression(ROWS, 1), rank, 2)
    shapley = gg.InRunShapley(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m: mse(m, (x, y)))
    try:
        with shapley.step(ids=range(len(y))):
            loss = mse(model, (x, y))
            (loss + (model.module.up.weight.square().sum() if rank else 0)).backward()
    except RuntimeError as error:
        return str(error)
