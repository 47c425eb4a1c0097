"""Operations are those that a model's products take, counted by hand and by torch; branches and arms add up."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ghostgram.algorithms.mates.evaluate import Paired, arms, decay_factor, paired_difference
from ghostgram.algorithms.mates.flops import KINDS, SELECT, UPDATE, FlopsLedger, Transformer

LAYERS, WIDTH, HIDDEN, VOCABULARY, LENGTH, BATCH = 2, 64, 256, 1000, 48, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.mT / 8, -1) @ v)
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def sizes(causal=False):
    weights = LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN) + WIDTH * VOCABULARY
    return Transformer(weights, LAYERS, WIDTH, weights + VOCABULARY * WIDTH, causal)


def by_hand(tokens=BATCH * LENGTH, length=LENGTH):
    """Forward of full attention, product by product, 2 operations for each multiplication and addition."""
    layer = 2 * WIDTH * 3 * WIDTH + 2 * length * WIDTH + 2 * length * WIDTH + 2 * WIDTH * WIDTH + 4 * WIDTH * HIDDEN
    return tokens * (LAYERS * layer + 2 * WIDTH * VOCABULARY)


def test_a_two_layer_model_by_hand_and_by_torch():
    model, ids = Model(), torch.randint(VOCABULARY, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counted:
        logits = model(ids)
    assert sizes().forward(BATCH * LENGTH, LENGTH) == pytest.approx(by_hand(), rel=1e-12)
    assert sizes().forward(BATCH * LENGTH, LENGTH) == pytest.approx(counted.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    whole = counted.get_total_flops() + backward.get_total_flops()
    assert sizes().train(BATCH * LENGTH, LENGTH) == pytest.approx(whole, rel=0.01)
    assert sizes().parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sizes().train(100, 1) == pytest.approx(6 * sizes().weights * 100, rel=0.01)  # 6 P tokens


def test_a_causal_model_has_half_the_pairs():
    pairs = sum(min(t, s) == s for t in range(LENGTH) for s in range(LENGTH))
    attention = BATCH * pairs * LAYERS * 4 * WIDTH
    assert sizes(True).forward(BATCH * LENGTH, LENGTH) == 2 * sizes().weights * BATCH * LENGTH + attention


def test_forward_mode_is_three_products_for_each():
    model, ids = Model(), torch.randint(VOCABULARY, (BATCH, LENGTH))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    directions = {name: torch.randn_like(parameter) for name, parameter in weights.items()}
    with FlopCounterMode(display=False) as counted:
        torch.func.jvp(lambda held: torch.func.functional_call(model, held, (ids,)), (weights,), (directions,))
    found = sizes().first_order("jvp", BATCH * LENGTH, LENGTH)
    assert found == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_labels_cost_what_their_parts_do():
    model, tokens, reference = sizes(True), 512, 4096
    exact = model.exact(tokens, LENGTH, reference, LENGTH)
    assert exact == 3 * model.forward(tokens, LENGTH) + model.forward(reference, LENGTH) + UPDATE * model.parameters
    costs = {name: model.first_order(name, tokens, 1) / (model.weights * tokens) for name in
             ("adam", "dots", "jvp", "finite_difference")}  # fmt: skip
    expected = {"adam": 8, "dots": 6, "jvp": 6, "finite_difference": 4}
    assert costs == pytest.approx(expected, rel=0.02)
    with pytest.raises(ValueError, match="backend: expected one of"):
        model.first_order("exact", 1, 1)


def test_the_ledger_adds_up():
    ledger = FlopsLedger()
    assert math.isnan(ledger.overhead)
    for number, kind in enumerate(KINDS):
        ledger.add(kind, 10.0**number)
    other = FlopsLedger()
    other.merge(ledger.spent)
    other.add("select", SELECT * 1e7)
    assert other.beside_training == 10 + 100 + 1000 + 10000 + 100000 + SELECT * 1e7
    assert other.overhead == other.beside_training
    with pytest.raises(ValueError, match="kind: expected one of"):
        ledger.add("probe", 1)
    with pytest.raises(ValueError, match="flops: expected at least 0, got -1"):
        ledger.add("fit", -1)


# Evaluation


def test_the_decay_branch():
    assert [decay_factor(step) for step in (0, 50, 100, 200)] == [1, 1 / 2, 1 / 4, 1 / 16]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay_factor)
    for _ in range(200):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(6.25e-5)]
    with pytest.raises(ValueError, match="step: expected 0 to 200, got 201"):
        decay_factor(201)


def test_arms_of_equal_tokens_and_of_equal_operations():
    overheads = {"random": 0.0, "classifier": 1e9, "influence": 3.05e9}
    equal = arms(overheads, 1000, 1e7)
    assert [arm.tokens for arm in equal.values()] == [1000] * 3
    assert equal["influence"].flops == 1000 * 1e7 + 3.05e9
    equal = arms(overheads, 1000, 1e7, "flops")
    assert {name: arm.tokens for name, arm in equal.items()} == {"random": 1305, "classifier": 1205, "influence": 1000}
    for arm in equal.values():
        assert 0 <= equal["influence"].flops - arm.flops < 1e7
    with pytest.raises(ValueError, match="equal: expected"):
        arms(overheads, 1000, 1e7, "time")
    with pytest.raises(ValueError, match="expected some arms and no negative number"):
        arms({}, 1000, 1e7)


@pytest.mark.parametrize(
    ("n", "level", "quantile"),
    [
        (2, 0.95, 12.7062),
        (3, 0.95, 4.3027),
        (4, 0.95, 3.1824),
        (5, 0.99, 4.6041),
        (11, 0.95, 2.2281),
        (31, 0.9, 1.6973),
    ],
)
def test_intervals_are_students(n, level, quantile):
    ours = {seed: 0.1 * seed**2 for seed in range(n)}
    theirs = {seed: float(seed) for seed in range(n)}
    found = paired_difference(ours, theirs, level)
    differences = torch.tensor([ours[seed] - theirs[seed] for seed in range(n)], dtype=torch.float64)
    assert found.mean == pytest.approx(differences.mean().item())
    reach = quantile * (differences.std() / n**0.5).item()
    assert found == pytest.approx(Paired(found.mean, found.mean - reach, found.mean + reach, n), rel=2e-4)


def test_runs_are_paired_by_seed():
    with pytest.raises(ValueError, match="expected the same seeds, 2 at least"):
        paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 2: 2.0})
    with pytest.raises(ValueError, match="expected the same seeds, 2 at least"):
        paired_difference({0: 1.0}, {0: 1.0})
    with pytest.raises(ValueError, match="level: expected a number in"):
        paired_difference({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}, 1.0)
