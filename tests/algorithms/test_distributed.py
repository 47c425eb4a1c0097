"""Several processes that share a run's batches find what one process finds."""

import functools

import numpy as np
import pytest
import torch

from algorithms import distributed as runs
from algorithms.ranks import on_ranks

WAYS = [("ddp", 2), ("ddp", 4), ("fsdp", 2)]
OF_FOUR = {"sgd", "adamw, accumulated", "order 2, replayed microbatches"}  # enough to see a factor that is not 1/2
CASES = [
    (how, count, name)
    for how, count in WAYS
    for name, setting in runs.SETTINGS.items()
    if how in setting.spread and (count == 2 or name in OF_FOUR)
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
SUMS = ("predicted", "history", "uncovered", "sum_phi", "l_before", "l_after", "cumulative_residual", "g_val_cosine")


@functools.cache
def alone(name):
    return runs.run(runs.SETTINGS[name])


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """spread(how, count): every rank's results, by setting; all of them in one group of processes."""

    @functools.cache
    def results(how, count):
        names = [name for *way, name in CASES if way == [how, count]]
        job = functools.partial(runs.run_all, how=how, names=names)
        return on_ranks(count, job, tmp_path_factory.mktemp("spread"))

    return results


@pytest.mark.parametrize(("how", "count", "name"), CASES)
def test_several_ranks_find_what_one_process_finds(spread, how, count, name):
    expected, ranks = alone(name), [each[name] for each in spread(how, count)]
    tolerance = 3e-2 if "bfloat16" in name else TOLERANCE[runs.SETTINGS[name].dtype]
    found = {key: phi for rank in ranks for key, phi in rank["phi"].items()}
    assert sum(len(rank["phi"]) for rank in ranks) == len(found) == len(expected["phi"])
    truth, got = (np.array([phi[key] for key in sorted(phi)]) for phi in (expected["phi"], found))
    assert np.abs(got - truth).max() <= tolerance * np.abs(truth).max()

    for rank in ranks[1:]:
        assert rank["ledger"] == ranks[0]["ledger"]
        assert all(torch.equal(rank["weights"][n], w) for n, w in ranks[0]["weights"].items())
    for row, true in zip(ranks[0]["ledger"], expected["ledger"], strict=True):
        assert {c: row[c] for c in ("step", "set", "order", "v_state", "g_val_age")} == {
            c: true[c] for c in ("step", "set", "order", "v_state", "g_val_age")
        }
        for column in SUMS:
            parts = true["sum_phi"], true["l_before"] or 0, true["cumulative_residual"] or 0, 1.0
            scale = max(map(abs, parts))
            assert row[column] == (true[column] and pytest.approx(true[column], abs=tolerance * scale)), column
    for n, weight in expected["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][n], weight, rtol=tolerance, atol=max(tolerance, 1e-9))


def test_what_one_rank_leaves_to_forward_mode_all_do(spread):
    for rank in spread("ddp", 2):
        assert rank["fallback, of uses of one rank"]["fallback"] == ["table.weight", "up.bias", "up.weight"]


def test_ways_to_spread_a_model_that_are_not_supported_are_named(spread):
    for message in (rank["refusals"] for rank in spread("ddp", 2)):
        assert "tensor parallelism is not supported" in message["tensor"]
        assert "FullyShardedDataParallel flattens parameters" in message["fsdp 1"]
        assert "HSDP" in message["hybrid"]
        assert "apply fully_shard to the whole model" in message["half"]
        assert "expected the DistributedDataParallel module itself" in message["inside"]
        assert "DistributedDataParallel(mixed_precision=...)" in message["mixed"]
        assert "PipelineStage of pipeline parallelism" in message["pipeline"]
        assert "curvature: expected 'midpoint' for a model under fully_shard" in message["hvp"]
        assert "late: expected 'replay' for a model under fully_shard" in message["forward"]
        assert "fallback: expected 'error' for a model under fully_shard" in message["jvp"]
        assert "audit_every: expected 0 for a model under fully_shard" in message["audit"]


def test_data_parallel_threads_are_refused():
    model = runs.build(runs.Setting("small"))[0]
    with pytest.raises(ValueError, match="DataParallel runs copies of the model in threads"):
        runs.engine(torch.nn.DataParallel(model))


def test_an_error_on_one_rank_is_an_error_on_all(spread):
    for rank in spread("ddp", 2):
        assert "some use of this parameter was not tapped" in rank["missed"]
