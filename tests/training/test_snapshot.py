"""Whatever an update moves is put back to the bit and into the same storage, and what is not is noticed."""

import pytest
import torch
from torch import nn

from ghostgram.training.snapshot import Snapshot, tensors_digest


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)
        self.down = nn.Linear(4, 5)
        self.down.weight = nn.Parameter(self.up.weight.detach().T.clone())
        self.tied = self.up

    def forward(self, x):
        return self.down(self.norm(self.tied(x)))


def step(model, optimizer, seed):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    (model(x) + torch.randn(())).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def state(model, optimizer):
    held = {name: (value, value.data_ptr(), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    for i, (_, entries) in enumerate(optimizer.state.items()):
        held |= {(i, name): (v, v.data_ptr(), v.clone()) for name, v in entries.items() if isinstance(v, torch.Tensor)}
    return held


def same(before, after):
    return before.keys() == after.keys() and all(
        was[0] is now[0] and was[1] == now[1] and torch.equal(was[2], now[2])
        for was, now in zip(before.values(), after.values(), strict=True)
    )


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("warm", [0, 2], ids=["fresh", "warm"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_everything_comes_back(name, warm):
    """A twin that has never been away takes the same next step."""
    pairs = []
    for _ in range(2):
        model = Model()
        optimizer = OPTIMIZERS[name](model.parameters())
        for seed in range(warm):
            step(model, optimizer, seed)
        pairs.append((model, optimizer))
    (model, optimizer), twin = pairs
    before, random = state(model, optimizer), torch.get_rng_state()
    snapshot = Snapshot(model, optimizer)
    for seed in range(10, 13):
        step(model, optimizer, seed)
        optimizer.param_groups[0]["lr"] = 0.3
        assert not same(before, state(model, optimizer))
        snapshot.restore()
        assert same(before, state(model, optimizer))
        assert torch.equal(torch.get_rng_state(), random)
        snapshot.check()
    assert optimizer.param_groups[0]["lr"] == 0.1
    for each in (pairs[0], twin):
        torch.set_rng_state(random)
        step(*each, 20)
    assert all(
        torch.equal(*pair) for pair in zip(model.state_dict().values(), twin[0].state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", ["up.weight", "norm.running_mean", "exp_avg_sq"])
def test_one_bit_is_noticed(name):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, 0)
    snapshot = Snapshot(model, optimizer)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers()) | optimizer.state[model.up.weight]
    tensors[name].detach().view(torch.int32).view(-1)[3] ^= 1
    with pytest.raises(RuntimeError, match=rf"changed are .*{name}"):
        snapshot.check()
    snapshot.restore()
    snapshot.check()


def test_values_that_cannot_be_put_back_are_refused():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for value, what in (([torch.zeros(2)], "list of tensors"), (object(), "a object")):
        optimizer.state[model.up.weight] = {"extra": value}
        with pytest.raises(TypeError, match=f"optimizer: 'extra' is .*{what}"):
            Snapshot(model, optimizer)
    optimizer.state[model.up.weight] = {"extra": [1, (2.0, None)]}
    snapshot = Snapshot(model, optimizer)
    optimizer.state[model.up.weight]["extra"].append(3)
    snapshot.restore()
    snapshot.restore()
    assert optimizer.state[model.up.weight]["extra"] == [1, (2.0, None)]


def test_digests_tell_names_types_shapes_and_bytes_apart():
    x = torch.arange(6, dtype=torch.float32)
    tensors = [
        {"a": x}, {"b": x}, {"a": x.view(2, 3)}, {"a": x.view(torch.int32)}, {"a": x + 1e-6}, {"a": x[:5]}, {},
        {"a": x, "b": x}, {"a": x.bfloat16()}, {"a": torch.tensor(1.0)},
    ]  # fmt: skip
    assert len({tensors_digest(each) for each in tensors}) == len(tensors)
    assert tensors_digest({"a": x, "b": x + 1}) == tensors_digest({"b": x + 1, "a": x.clone()})
    assert tensors_digest({"a": x.view(2, 3).T}) == tensors_digest({"a": x.view(2, 3).T.contiguous()})


class Quantised(torch.Tensor):
    """A tensor of codes and a scale, of which no operator knows."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return Quantised(**parts)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} is not needed for this")


def test_tensors_made_of_others_are_kept_part_by_part():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moment = Quantised(torch.arange(4, dtype=torch.int8), torch.ones(()))
    optimizer.state[model.up.bias] = {"moment": moment}
    snapshot = Snapshot(model, optimizer)
    moment.codes[2] = 7
    moment.scale += 1
    with pytest.raises(RuntimeError, match=r"up\.bias\.moment\.codes, optimizer\.up\.bias\.moment\.scale$"):
        snapshot.check()
    snapshot.restore()
    assert optimizer.state[model.up.bias]["moment"] is moment
    assert (moment.codes.tolist(), moment.scale.item()) == ([0, 1, 2, 3], 1.0)
    snapshot.check()
