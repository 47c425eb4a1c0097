"""Two processes that share a model find the labels that one finds, and read each other's checkpoints."""

import pytest
import torch

from algorithms.mates import sharded
from algorithms.mates.models import trained
from algorithms.mates.test_adapters import by_name, fresh, same, saved
from algorithms.ranks import on_ranks
from ghostgram.algorithms.mates.labels.adapters import load_sharded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    saved(*trained(grouped=True, weight_decay=0.1), folder / "whole")
    return folder, on_ranks(2, sharded.both, folder)


def close(one, other):
    return torch.allclose(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-9, atol=1e-13)


def test_a_sharded_model_has_the_same_labels(ranks):
    truth = sharded.alone()
    for result in (each["sharded"] for each in ranks[1]):
        assert all(map(close, result["influence"], truth["influence"]))
        assert all(close(result[name], truth[name]) for name in ("base", "null", "null loss"))
        for vocab, columns in truth["first order"].items():
            assert all(map(close, result["first order"][vocab], columns)), vocab
        for kind, tensors in truth["tensors"].items():
            for name, tensor in tensors.items():
                assert close(result["tensors"][kind][name], tensor), (kind, name)
        assert all(torch.equal(result["weights"][name], weight) for name, weight in truth["weights"].items())


def test_replicas_label_documents_of_their_own(ranks):
    truth = sharded.alone()["influence"]
    parts = [each["replicated"]["influence"] for each in ranks[1]]
    assert [len(part[0]) for part in parts] == [3, 2]
    assert all(close(torch.cat(columns), true) for *columns, true in zip(*parts, truth, strict=True))


@pytest.mark.parametrize(("how", "names"), [
    ("replicated", ["labels", "again"]), ("sharded", ["labels", "labels without a stage"]),
])  # fmt: skip
def test_a_stage_of_two_processes_is_that_of_one(ranks, how, names):
    truth = sharded.labelled(*trained(grouped=True, weight_decay=0.1)).table
    check_tables([each[how][name] for each in ranks[1] for name in names], truth)


def test_two_processes_audit_together(ranks):
    truth = sharded.labelled(*trained(grouped=True, weight_decay=0.1), None, "auto", 23)
    check_tables([each[how]["audited"] for each in ranks[1] for how in ("replicated", "sharded")], truth.table)
    assert set(truth.table["backend"].to_pylist()) == {"exact", "dots"}
    for audit in (each["replicated"]["audit"] for each in ranks[1]):
        assert audit["comparisons"][0]["rho"] == truth.manifest["audit"]["comparisons"][0]["rho"]
        assert audit["worth"][0]["halves"] == truth.manifest["audit"]["worth"][0]["halves"]


def check_tables(tables, truth):
    for table in tables:
        assert table.column_names == truth.column_names
        for name in table.column_names:
            one, other = table[name].to_pylist(), truth[name].to_pylist()
            assert one == (pytest.approx(other, rel=1e-6) if isinstance(other[0], float) else other)


def test_what_two_processes_saved_one_can_load(ranks):
    model, optimizer = fresh()
    load_sharded(model, optimizer, ranks[0] / "parts")
    expected = trained(grouped=True, weight_decay=0.1)
    assert same(by_name(model, optimizer), by_name(*expected))
    assert all(map(torch.equal, model.parameters(), expected[0].parameters()))
