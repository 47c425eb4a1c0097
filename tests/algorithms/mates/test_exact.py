"""Exact labels are the optimizer's own step, leave nothing behind, and know neither order nor base."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from algorithms.mates.models import TASK, bits, bytes_of, documents, reference, same_bits, trained
from ghostgram.algorithms.mates.labels.backend import levels
from ghostgram.algorithms.mates.labels.exact import ExactLabels
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.algorithms.mates.labels.task import Task


def exact(model, optimizer, references, task=TASK, clip=1.0, lrs=None, **options):
    backend = ExactLabels(model, OptimizerView(model, optimizer, clip=clip, lrs=lrs), references, task, **options)
    backend.prepare()
    return backend


def ranks(x):
    return x.argsort().argsort().double()


@pytest.mark.parametrize("ascends", [False, True])
def test_a_document_helps_itself_and_hurts_where_its_step_is_turned_round(ascends):
    """One reference example, the document is that example, no momentum, no decay."""
    model, optimizer = trained(weight_decay=0.0, maximize=ascends)
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    r = reference(1)
    view = OptimizerView(model, optimizer, clip=1.0, lrs=[1e-5])
    backend = ExactLabels(model, view, [r], TASK)
    backend.prepare()
    influence = backend.influence(r.ids, r.mask)
    g = r.gradient(model, TASK)
    frozen = influence.clip * sum((g[p] * view.slope(p) * g[p]).sum() for p in view.names)
    adam = -sum((g[p] * view.delta(p, influence.clip * g[p])).sum() for p in view.names)
    assert influence.clip.item() < 1
    assert abs(backend.null_gain.item()) <= 1e-15
    assert (influence.values.item() > 0) == (frozen.item() > 0) == (not ascends)
    assert influence.values.item() == pytest.approx(adam.item(), rel=0.02)


class Point(nn.Module):
    """A model whose loss on a document is its squared distance to a table's row."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.at = nn.Parameter(torch.randn(5, generator=g, dtype=torch.float64))
        self.register_buffer("table", torch.randn(9, 5, generator=g, dtype=torch.float64))


@dataclass(frozen=True)
class Quadratic(Task):
    """A document is rows of the table; each token's loss is half the squared distance to its row."""

    def sums(self, model, ids, mask):
        distances = 0.5 * (model.at - model.table[ids]).square().sum(-1)
        return (distances * mask).sum(1), mask.sum(1)


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("settings", [dict(), dict(momentum=0.9, weight_decay=0.1)])
def test_a_quadratic_under_sgd_has_a_closed_form(settings, clip):
    model, task = Point(), Quadratic(bytes_of)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **settings)
    for row in (0, 1):
        (model.at - model.table[row]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    mask = torch.tensor([[False, True, True]] * 2)
    references = [
        Reference("one", torch.tensor([[0, 2, 3], [0, 4, 5]]), mask),
        Reference("two", torch.tensor([[0, 6, 7]]), mask[:1]),
    ]
    view = OptimizerView(model, optimizer, clip=clip)
    backend = ExactLabels(model, view, references, task)
    backend.prepare()
    ids, mask = torch.tensor([[0, 1, 2], [0, 8, 0]]), torch.tensor([[False, True, True], [False, True, False]])
    found = backend.influence(ids, mask)

    theta, (targets,) = model.at.detach(), (model.table,)
    means = [targets[[1, 2]].mean(0), targets[8]]
    centres = [targets[[2, 3, 4, 5]].mean(0), targets[[6, 7]].mean(0)]
    _, gains = levels(view, references, task)
    for i, centre_of_document in enumerate(means):
        g = theta - centre_of_document
        c = 1.0 if clip is None else min(1.0, clip / (g.norm().item() + 1e-6))
        history = -0.05 * (settings.get("weight_decay", 0) * theta)
        if settings:
            history -= 0.05 * 0.9 * optimizer.state[model.at]["momentum_buffer"]
        d = history - 0.05 * c * g
        for k, centre in enumerate(centres):
            expected = -(d @ (theta - centre) + 0.5 * d @ d)
            assert abs(found.values[i, k] - expected) <= 1e-10
            # What a first-order backend would say lacks the curvature of the document's own part alone.
            own, null = -0.05 * c * g, theta + history
            linear = gains[k] - own @ (null - centre)
            assert abs(linear - 0.5 * own @ own - expected) <= 1e-10
        assert abs(found.norms[i] - g.norm()) <= 1e-10
        assert abs(found.clip[i] - c) <= 1e-12


def test_a_hundred_probes_leave_nothing():
    """All tensors, states and random states afterwards, and then a step like that of a twin that was never probed."""
    model, optimizer = trained(grouped=True, weight_decay=0.1, dtype=torch.float32)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    model.train()
    model.token.weight.grad = torch.ones_like(model.token.weight)
    before = bits(model, optimizer)
    places = [p.data_ptr() for p in model.parameters()] + [s["exp_avg"].data_ptr() for s in optimizer.state.values()]
    backend = exact(model, optimizer, [reference(3)], lrs=[0.01, 0.02], train_mode=True)
    backend.influence(*bytes_of(documents(100, 5)))
    assert same_bits(bits(model, optimizer), before)
    assert places == [p.data_ptr() for p in model.parameters()] + [
        s["exp_avg"].data_ptr() for s in optimizer.state.values()
    ]
    assert all(module.training for module in model.modules())
    assert (model.token.weight.grad == 1).all()
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 1.5e-3]
    model.zero_grad()
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        TASK.losses(m, *bytes_of(documents(8, 6))).mean().backward()
        o.step()
    assert same_bits(bits(model, optimizer), bits(twin, twin_optimizer))


def by_the_formula(model, optimizer, ids, mask, r, clip):
    """The reference loss after an update written from its formula."""
    names = dict(model.named_parameters())
    loss = TASK.losses(model, ids, mask).sum()
    grads = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    c = min(1.0, clip / (float(norm) + 1e-6))
    there = {}
    for name, p in names.items():
        (group,) = (each for each in optimizer.param_groups if any(p is one for one in each["params"]))
        (b1, b2), eta, state, g = group["betas"], group["lr"], optimizer.state[p], c * grads[name]
        t = float(state["step"]) + 1
        m, v = b1 * state["exp_avg"] + (1 - b1) * g, b2 * state["exp_avg_sq"] + (1 - b2) * g * g
        step = eta * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])
        there[name] = (1 - eta * group["weight_decay"]) * p.detach() - step
    with torch.no_grad():
        logits = torch.func.functional_call(model, there, (r.ids[:, :-1],))
        terms = nn.functional.cross_entropy(logits.flatten(0, 1), r.ids[:, 1:].flatten(), reduction="none")
    return float((terms.double() * r.mask[:, 1:].flatten()).sum()) / r.tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_update_of_the_formula(dtype):
    model, optimizer = trained(grouped=True, weight_decay=0.1, dtype=dtype)
    r, (ids, mask) = reference(8), bytes_of(documents(256, 7))
    found = exact(model, optimizer, [r], clip=0.8).influence(ids, mask).values[:, 0]
    base = r.loss(model, TASK)
    after = [by_the_formula(model, optimizer, ids[i : i + 1], mask[i : i + 1], r, 0.8) for i in range(256)]
    truth = base - torch.tensor(after, dtype=torch.float64)
    assert found.std() > 1e-5
    if dtype == torch.float64:
        assert (found - truth).abs().max() <= 1e-12
    else:
        assert (found - truth).abs().max() <= 5e-6
        assert torch.corrcoef(torch.stack([ranks(found), ranks(truth)]))[0, 1] >= 0.999


def test_the_order_of_documents_is_nothing():
    """With dropout either: every document is read with the random states of the snapshot."""
    model, optimizer = trained()
    model.norm.register_forward_hook(lambda norm, _, out: nn.functional.dropout(out, 0.2, norm.training))
    ids, mask = bytes_of(documents(10, 8))
    backend = exact(model, optimizer, [reference(), reference(3, 2, "other")], train_mode=True)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    straight, shuffled = backend.probe(ids, mask), backend.probe(ids[order], mask[order])
    assert all(torch.equal(x[order], y) for x, y in zip(straight[0], shuffled[0], strict=True))
    assert all(torch.equal(x[order], y) for x, y in zip(straight[1], shuffled[1], strict=True))
    evaluated = exact(model, optimizer, [reference()]).probe(ids, mask)
    assert (evaluated[0].own_loss - straight[0].own_loss).abs().min() > 1e-4
    expected = TASK.losses(model.eval(), ids, mask).detach()
    assert torch.allclose(evaluated[0].own_loss, expected, rtol=1e-12, atol=0)


@dataclass(frozen=True)
class Raised(Task):
    """Every target's loss is raised by the same number of nats."""

    by: float = 1e3

    def sums(self, model, ids, mask):
        sums, counts = super().sums(model, ids, mask)
        return sums + self.by * counts, counts


def test_the_base_is_subtracted():
    model, optimizer = trained()
    documents_, r = bytes_of(documents(6, 9)), reference()
    plain = exact(model, optimizer, [r]).influence(*documents_)
    raised = exact(model, optimizer, [r], Raised(bytes_of))
    assert raised.base_loss.item() > 1e3
    assert (raised.influence(*documents_).values - plain.values).abs().max() <= 1e-9
    losses = (raised.base_loss - plain.values[:, 0]).half()
    assert len(losses.unique()) == 1  # half precision would have kept nothing of the documents


def test_influence_is_the_sum_over_the_references_examples():
    model, optimizer = trained()
    references = [reference(), reference(5, 3, "other")]
    backend = exact(model, optimizer, references)
    influence, examples = backend.probe(*bytes_of(documents(3, 10)))
    for k, (r, gains) in enumerate(zip(references, examples, strict=True)):
        assert gains.shape == (3, len(r.ids))
        assert torch.allclose(gains.sum(1) / r.tokens, influence.values[:, k], rtol=1e-12, atol=0)
        half = Reference("half", r.ids[::2], r.mask[::2])
        alone = exact(model, optimizer, [half]).influence(*bytes_of(documents(3, 10)))
        assert torch.allclose(gains[:, ::2].sum(1) / half.tokens, alone.values[:, 0], rtol=1e-9, atol=1e-15)


def test_the_null_gain_is_that_of_the_closed_form():
    model, optimizer = trained(weight_decay=0.1)
    backend = exact(model, optimizer, [reference()], lrs=[0.01])
    base, gain = levels(backend.view, backend.references, TASK)
    assert torch.equal(backend.base_loss, base)
    assert (backend.null_gain - gain).abs().max() <= 1e-14
    assert abs(gain.item()) > 1e-5


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Adafactor, torch.optim.SGD])
def test_any_optimizer_will_do(kind):
    model, optimizer = trained(kind)
    r, (ids, mask) = reference(), bytes_of(documents(1, 11))
    found = exact(model, optimizer, [r], clip=None).influence(ids, mask).values.item()
    base = r.loss(model, TASK)
    TASK.losses(model, ids, mask).sum().backward()
    optimizer.step()
    assert found == pytest.approx(base - r.loss(model, TASK), abs=1e-14)


class Experts(nn.Module):
    """Two tables, one of which odd first bytes never reach."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.even, self.odd = nn.Embedding(256, 8), nn.Embedding(256, 8)
        self.head = nn.Linear(8, 256)

    def forward(self, ids):
        table = self.odd if int(ids[0, 0]) % 2 else self.even
        return self.head(table(ids))


def test_what_a_document_does_not_reach_moves_by_momentum_all_the_same():
    model = Experts().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for text in ("abcabc", "bcabca"):
        TASK.losses(model, *bytes_of([text])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    r = Reference("odd", *bytes_of(["abcd"]))
    backend = exact(model, optimizer, [r], clip=None)
    found = backend.influence(*bytes_of(["bb"])).values.item()
    TASK.losses(model, *bytes_of(["bb"])).sum().backward()
    model.odd.weight.grad = torch.zeros_like(model.odd.weight)
    optimizer.step()
    assert found == pytest.approx(backend.base_loss.item() - r.loss(model, TASK), abs=1e-14)


def test_training_that_went_on_is_noticed():
    model, optimizer = trained()
    backend = exact(model, optimizer, [reference()])
    with torch.no_grad():
        model.norm.bias[3] += 1e-3
    kept = bits(model, optimizer)
    with pytest.raises(RuntimeError, match=r"changed are model\.norm\.bias"):
        backend.influence(*bytes_of(["abc"]))
    assert same_bits(bits(model, optimizer), kept)
    with pytest.raises(RuntimeError, match=r"prepare\(\) must be called"):
        ExactLabels(model, backend.view, [reference()], TASK).influence(*bytes_of(["abc"]))


def test_a_probe_that_fails_is_put_back():
    model, optimizer = trained()
    backend = exact(model, optimizer, [reference()])
    before = bits(model, optimizer)
    hook = optimizer.register_step_post_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        backend.influence(*bytes_of(["abc"]))
    hook.remove()
    assert same_bits(bits(model, optimizer), before)
    assert backend.influence(*bytes_of(["abc"])).values.isfinite().all()


def test_its_cost_is_counted():
    model, optimizer = trained()
    r = reference()
    weights = sum(p.numel() for p in model.parameters())
    positions = sum(int(row.nonzero().max()) for row in r.mask)
    assert exact(model, optimizer, [r]).flops(10) == weights * (60 + 2 * positions + 12)
