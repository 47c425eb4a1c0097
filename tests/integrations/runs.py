"""What both trainers' tests compare: two runs' values and ledgers; and a process of several, as launchers set it up."""

import os
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import torch.distributed as dist


def column(table, name):
    return np.array(table[name].to_pylist(), float)


def assert_same_values(found, expected, tolerance=1e-5):
    """Row by row of the step log, relative to the largest value; and the ledger's measurements."""
    for name in ("step", "sample_id", "microbatch"):
        assert found.step_log()[name].to_pylist() == expected.step_log()[name].to_pylist()
    phi, truth = (column(shapley.step_log(), "phi_validation") for shapley in (found, expected))
    assert np.abs(phi - truth).max() <= tolerance * np.abs(truth).max()
    rounding = 4 * np.spacing(np.float32(column(expected.ledger(), "l_before").max()))
    differences = {"cumulative_residual"}  # of float32 losses
    if expected.ledger()["order"][0].as_py() == 2:
        differences.add("predicted")  # whose history is one
    for name in ("l_before", "l_after", "predicted", "cumulative_residual"):
        a, b = (column(shapley.ledger(), name) for shapley in (found, expected))
        allowed = tolerance * np.abs(b).max() + (rounding if name in differences else 0.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=allowed)


def together(ranks):
    """What the (step log, ledger) of every rank are as those of one run."""
    for _, ledger in ranks[1:]:
        for name in ledger.column_names:
            assert ledger[name].to_pylist() == ranks[0][1][name].to_pylist(), (name, ledger[name], ranks[0][1][name])
    order = [(name, "ascending") for name in ("step", "microbatch", "rank")]
    log = pa.concat_tables([log for log, _ in ranks]).sort_by(order)
    return SimpleNamespace(step_log=lambda: log, ledger=lambda: ranks[0][1])


def as_launched():
    """Tells this rank of a group that is there already what a launcher would: both trainers read it."""
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, NODE_RANK="0", WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")  # nobody meets there
