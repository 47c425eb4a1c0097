"""What two processes that share a model find, for comparison with one that has it alone."""

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from algorithms.mates.models import TASK, bytes_of, documents, reference, trained
from algorithms.mates.test_adapters import saved
from ghostgram.algorithms.mates.files.identity import doc_id
from ghostgram.algorithms.mates.labels.adapters import load_sharded
from ghostgram.algorithms.mates.labels.exact import ExactLabels
from ghostgram.algorithms.mates.labels.first_order import AdamLabels, DotsLabels
from ghostgram.algorithms.mates.labels.forward import JvpLabels
from ghostgram.algorithms.mates.labels.label import label
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.taps.sharding import local, rows_of, whole


def found(model, optimizer, ids, mask):
    """Labels and base losses, the view's tensors and a reference's gradient, all of them whole."""
    view = OptimizerView(model, optimizer, clip=0.8)
    first_order = {vocab: dots(view, ids, mask, vocab) for vocab in DotsLabels.vocabs}
    backend = ExactLabels(view.model, view, [reference(), reference(3, 2, "other")], TASK)
    backend.prepare()
    influence = backend.influence(ids, mask)
    after = {name: whole(p.detach()).clone() for p, name in view.names.items()}
    gradient = reference().gradient(model, TASK)
    tensors = {"gradient": gradient, "null": {p: view.null(p) for p in view.names}}
    tensors["slope"] = {p: view.slope(p) for p in view.names}
    tensors["delta"] = {p: view.delta(p, gradient[p]) for p in view.names}
    with view.at_null():
        null_loss = reference().loss(model, TASK)
    joined = {kind: {view.names[p]: whole_of(values[p], p) for p in view.names} for kind, values in tensors.items()}
    return {"influence": tuple(influence), "base": backend.base_loss, "null": backend.null_gain, "weights": after} | {
        "tensors": joined, "null loss": null_loss, "first order": first_order,
    }  # fmt: skip


def dots(view, ids, mask, vocab):
    """First-order labels, and the share of slopes that were capped; of tokens whose rows both processes hold."""
    spread = [Reference(r.name, r.ids * 37 % 256, r.mask) for r in (reference(), reference(3, 2, "other"))]
    backend = DotsLabels(view.model, view, spread, TASK, vocab=vocab)
    assert backend.why_not() is None
    backend.prepare()
    return *backend.influence(ids * 37 % 256, mask), backend.base_loss, backend.null_gain, backend.capped_fraction


def whole_of(part, parameter):
    """The whole of what every process has a part of, as it has of a parameter."""
    if not hasattr(parameter, "placements"):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    ).full_tensor()


def alone():
    return found(*trained(grouped=True, weight_decay=0.1), *bytes_of(documents(5, 20)))


def labelled(model, optimizer, run=None, backend="exact", count=9):
    texts = documents(count, 21)
    audit = 0 if backend == "exact" else 17
    given = pa.table({"doc_id": pa.array([doc_id(text) for text in texts], pa.binary(16)), "text": texts})
    return label(
        model,
        optimizer,
        given,
        [reference()],
        TASK,
        run,
        backend=backend,
        audit=audit,
        clip=0.8,
        chunk=2,
        progress=False,
    )


def sharded(rank, folder):
    """A checkpoint of one process, loaded into a model that both share, labelled there, and saved again."""
    model, _ = trained(steps=0)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    parameters = list(model.parameters())
    groups = [[p for p in parameters if p.dim() == 1], [p for p in parameters if p.dim() > 1]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    load_sharded(model, optimizer, folder / "whole")
    assert any(local(p).numel() < p.numel() for p in parameters)
    results = found(model, optimizer, *bytes_of(documents(5, 20)))
    results["labels"] = labelled(model, optimizer, folder / "sharded").table
    results["labels without a stage"] = labelled(model, optimizer).table
    results["audited"] = labelled(model, optimizer, folder / "audited sharded", "auto", 23).table
    view = OptimizerView(model, optimizer, clip=0.8)
    for kind in (AdamLabels, JvpLabels):
        assert kind(model, view, [reference()], TASK).why_not() == "the weights are sharded over processes"
    fully_shard(uneven := torch.nn.Linear(3, 5))
    for p in (*parameters, uneven.weight, uneven.bias):
        start, stop = rows_of(p)
        assert torch.equal(whole(p.detach())[start:stop], local(p))
    saved(model, optimizer, folder / "parts")
    return results


def replicated(rank, folder):
    """Each process labels its own documents, and they share those of a stage."""
    model, optimizer = trained(grouped=True, weight_decay=0.1)
    model = DistributedDataParallel(model)
    ids, mask = bytes_of(documents(5, 20))
    mine = slice(0, 3) if rank == 0 else slice(3, 5)
    results = found(model, optimizer, ids[mine], mask[mine])
    results["labels"] = labelled(model, optimizer, folder / "replicated").table
    results["again"] = labelled(model, optimizer, folder / "replicated").table
    audited = labelled(model, optimizer, folder / "audited", "auto", 23)
    results["audited"], results["audit"] = audited.table, audited.manifest["audit"]
    with pytest.raises(ValueError, match="run: expected a folder"):
        labelled(model, optimizer)
    return results


def both(rank, folder):
    return {"sharded": sharded(rank, folder), "replicated": replicated(rank, folder), "size": dist.get_world_size()}
