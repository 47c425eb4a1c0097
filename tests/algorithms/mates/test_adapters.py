"""States come back under the names they were saved of, and a map that cannot be right is refused with the names."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from algorithms.mates.models import TASK, bytes_of, documents, trained
from algorithms.models import LENGTH, VOCABULARY, language_model
from ghostgram.algorithms.mates.labels.adapters import load_numbered, load_sharded, trainer_groups
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is enough here


def by_name(model, optimizer):
    """{(name, kind): value} of all states, and {name: settings}."""
    names = {p: n for n, p in model.named_parameters()}
    states = {(names[p], kind): value for p, state in optimizer.state.items() for kind, value in state.items()}
    settings = {
        names[p]: {k: v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return states, settings


def same(one, other):
    (states, settings), (others, theirs) = one, other
    return (
        states.keys() == others.keys()
        and settings == theirs
        and all(torch.equal(torch.as_tensor(states[key]), torch.as_tensor(others[key])) for key in states)
    )


def next_step(model, optimizer):
    TASK.losses(model, *bytes_of(documents(4, 50))).mean().backward()
    optimizer.step()
    return [p.detach() for p in model.parameters()]


def names_by_group(model, optimizer):
    names = {p: n for n, p in model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


KINDS = {
    "AdamW": (torch.optim.AdamW, dict(amsgrad=True)),
    "fused": (torch.optim.AdamW, dict(fused=True)),
    "momentum": (torch.optim.SGD, dict(momentum=0.9)),
    "SGD": (torch.optim.SGD, dict()),
}


@pytest.mark.parametrize("name", KINDS)
def test_numbered_states_come_back(name, tmp_path):
    """Through a file, under other groups than the model's order; then the next step is the same."""
    kind, settings = KINDS[name]
    model, optimizer = trained(kind, 3, grouped=True, weight_decay=0.1, **settings)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    twin = copy.deepcopy(model)
    loaded = load_numbered(twin, tmp_path / "optimizer.pt", names_by_group(model, optimizer), kind)
    assert same(by_name(twin, loaded), by_name(model, optimizer))
    OptimizerView(twin, loaded, clip=1.0)
    assert all(map(torch.equal, next_step(twin, loaded), next_step(model, optimizer)))


@pytest.mark.parametrize(("change", "message"), [
    (lambda groups: [groups[1], groups[0]], r"expected \[6, 10\] parameters, .* got \[10, 6\]"),
    (lambda groups: [groups[0][::-1], groups[1]], r"token.weight \(256, 16\) would get .* of number 5"),
    (lambda groups: [groups[0][1:], groups[1]], "trainable, but in none: token.weight"),
    (lambda groups: [[*groups[0], "norm.bias"], groups[1]], "named twice: norm.bias"),
    (lambda groups: [["wte.weight", *groups[0][1:]], groups[1]], "not parameters of the model: wte.weight"),
])  # fmt: skip
def test_maps_that_cannot_be_right_are_refused(change, message):
    model, optimizer = trained(grouped=True)
    groups = names_by_group(model, optimizer)
    with pytest.raises(ValueError, match=message):
        load_numbered(model, optimizer.state_dict(), change(groups))


def test_a_number_without_state_is_named():
    model, optimizer = trained(grouped=True)
    state = optimizer.state_dict()
    del state["state"][3]
    with pytest.raises(ValueError, match=f"no state of: {names_by_group(model, optimizer)[0][3]}"):
        load_numbered(model, state, names_by_group(model, optimizer))


def test_the_trainers_file_comes_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = language_model("gpt2 tied", torch.float32)
    ids = torch.randint(0, VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=4, weight_decay=0.1,
        report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    fresh = language_model("gpt2 tied", torch.float32)
    fresh.load_state_dict(model.state_dict())
    loaded = load_numbered(fresh, tmp_path / "checkpoint-2" / "optimizer.pt")
    assert same(by_name(fresh, loaded), by_name(model, trainer.optimizer.optimizer))
    decayed, others = trainer_groups(fresh)
    assert "transformer.wte.weight" in decayed
    assert "transformer.ln_f.weight" in others
    view = OptimizerView(fresh, loaded, clip=1.0)
    assert view.scalars(fresh.transformer.wte.weight)[4] == pytest.approx(1 - 0.9**3)
    fresh.transformer.wpe.weight = torch.nn.Parameter(torch.zeros(16, 24))
    with pytest.raises(ValueError, match=r"wpe.weight \(16, 24\) would get the exp_avg\w* \(32, 24\)"):
        load_numbered(fresh, tmp_path / "checkpoint-2" / "optimizer.pt")


def saved(model, optimizer, folder, flat=False):
    weights, states = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    dcp.save({"model": weights, "optim": states}, checkpoint_id=folder)


def fresh(kind=torch.optim.AdamW, groups=("vectors", "matrices"), **settings):
    """An untrained twin of `trained`'s model whose optimizer has its groups in the other order."""
    model, _ = trained(steps=0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    parts = {
        "matrices": [p for p in model.parameters() if p.dim() > 1],
        "vectors": [p for p in model.parameters() if p.dim() == 1],
    }
    return model, kind([{"params": parts[name][::-1]} for name in groups], lr=1.0, **settings)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", KINDS)
def test_sharded_checkpoints_come_back_by_name(name, flat, tmp_path):
    kind, settings = KINDS[name]
    model, optimizer = trained(kind, 3, grouped=True, weight_decay=0.1, **settings)
    saved(model, optimizer, tmp_path, flat)
    twin, loaded = fresh(kind)
    load_sharded(twin, loaded, tmp_path)
    assert same(by_name(twin, loaded), by_name(model, optimizer))
    assert all(map(torch.equal, next_step(twin, loaded), next_step(model, optimizer)))


def test_weights_can_be_left_as_they_are(tmp_path):
    model, optimizer = trained(grouped=True)
    saved(model, optimizer, tmp_path)
    twin, loaded = fresh()
    load_sharded(twin, loaded, tmp_path, weights=None)
    assert same(by_name(twin, loaded), by_name(model, optimizer))
    assert not any(p.any() for p in twin.parameters())


@pytest.mark.parametrize(("fault", "message"), [
    ("one group", "group 0 has norm.bias and blocks.0.down.weight, which were saved with different settings"),
    ("missing", "no optim.state of: extra"),
    ("left over", "optim.state of what is not trainable here: norm.bias"),
    ("shape", r"other shapes: norm.bias \(3,\) would get a exp_avg \(16,\)"),
    ("key", "does not hold: weights.blocks"),
])  # fmt: skip
def test_checkpoints_that_do_not_fit_are_refused_before_anything_is_written(fault, message, tmp_path):
    saved(*trained(grouped=True), tmp_path)
    model, optimizer = fresh()
    if fault == "one group":
        parameters = [*optimizer.param_groups[0]["params"], *optimizer.param_groups[1]["params"]]
        optimizer = torch.optim.AdamW(parameters)
    elif fault == "missing":
        model.extra = torch.nn.Parameter(torch.zeros(2))
        optimizer.add_param_group({"params": [model.extra]})
    elif fault == "left over":
        model.norm.bias.requires_grad_(False)
    elif fault == "shape":
        model.norm.bias = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        load_sharded(model, optimizer, tmp_path, weights="weights" if fault == "key" else "model")
    assert not any(p.any() for p in model.parameters())
    assert not optimizer.state
