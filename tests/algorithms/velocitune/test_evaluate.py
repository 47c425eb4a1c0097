"""Losses of domains: the definition, whoever computes it, the model left as it was, the logits not stored whole."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from algorithms.models import language_model
from algorithms.ranks import on_ranks
from ghostgram.algorithms.velocitune.evaluate import duplicates, evaluate_domains
from ghostgram.algorithms.velocitune.losses import NextTokenLoss, Sums

VOCABULARY = 61


def texts(count, seed, lengths=(4, 20)):
    g = np.random.default_rng(seed)
    return [torch.from_numpy(g.integers(0, VOCABULARY, int(g.integers(*lengths)))) for _ in range(count)]


SETS = {"code": texts(9, 0), "prose": texts(5, 1)}


def by_definition(model, sequences):
    with torch.no_grad():
        rows = [F.cross_entropy(model(x[None]).logits[0, :-1], x[1:], reduction="sum") for x in sequences]
    S, T = torch.stack(rows).double().numpy(), np.array([len(x) - 1 for x in sequences])
    mean, n = S.sum() / T.sum(), len(S)
    return mean, np.sqrt(n / (n - 1) * ((S - mean * T) ** 2).sum()) / T.sum()


@pytest.mark.parametrize("kind", ["llama", "gpt2 tied"])
@pytest.mark.parametrize("reduce", ["ordered", "sums"])
def test_the_definition(kind, reduce):
    model = language_model(kind).eval()
    found = evaluate_domains(model, SETS, reduce=reduce, batch=4)
    for k, sequences in enumerate(SETS.values()):
        assert (found.loss[k], found.se[k]) == pytest.approx(by_definition(model, sequences), rel=1e-10)
        assert found.tokens[k] == sum(len(x) - 1 for x in sequences)
        assert found.sequences[k] == len(sequences)


class Fixed(nn.Module):
    """Sequences (S, T) that are their own losses."""

    def __call__(self, sequences):
        return Sums(
            torch.tensor([s for s, _ in sequences], dtype=torch.float64), torch.tensor([t for _, t in sequences])
        )


def clusters(n, seed, lengths=(50, 512)):
    """Losses of sequences whose tokens resemble each other."""
    g = np.random.default_rng(seed)
    T = g.integers(*lengths, n)
    S = T * g.normal(2.0, 0.5, n) + g.normal(0, 2.5, n) * np.sqrt(T)
    return list(zip(S.tolist(), T.tolist(), strict=True))


def test_standard_error_is_that_of_resampled_sequences():
    sequences = clusters(400, 0)
    found = evaluate_domains(Fixed(), {"a": sequences}, loss=Fixed())
    g, (S, T) = np.random.default_rng(1), np.array(sequences).T
    drawn = g.integers(0, 400, (2000, 400))
    resampled = S[drawn].sum(1) / T[drawn].sum(1)
    assert found.se[0] == pytest.approx(resampled.std(), rel=0.1)
    # Tokens taken for independent would give a fifth of it.
    assert found.se[0] > 3 * 2.5 / np.sqrt(T.sum())


def test_equal_lengths_give_the_plain_standard_error():
    sequences = [(s, 100) for s, _ in clusters(50, 2)]
    S = np.array([s for s, _ in sequences])
    found = evaluate_domains(Fixed(), {"a": sequences}, loss=Fixed())
    assert found.se[0] == pytest.approx((S / 100).std(ddof=1) / np.sqrt(50), rel=1e-14)


FIXED = {"a": clusters(23, 3), "b": clusters(2, 4), "c": clusters(11, 5)}


def fixed_losses(rank, folder):
    return [evaluate_domains(Fixed(), FIXED, loss=Fixed(), reduce=reduce, batch=3) for reduce in ("ordered", "sums")]


def sharded_losses(rank, folder):
    """The same model plain, in DistributedDataParallel and under fully_shard: losses, and what is left of it."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def ones(n):
        return torch.ones(1, n, dtype=torch.int64)

    found = []
    for wrap in ("none", "ddp", "fsdp"):
        model = language_model("llama", torch.float32)
        if wrap == "ddp":
            model = DistributedDataParallel(model)
        if wrap == "fsdp":
            fully_shard(model.model.layers[0])
            fully_shard(model)
        before = evaluate_domains(model, SETS, batch=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(ones(7), labels=ones(7)).loss.backward()
        optimizer.step()
        found.append((before, evaluate_domains(model, SETS, batch=2)))
    return found


def on_two(rank, folder):
    broken = {"a": [*clusters(3, 0), (float("nan"), 4)]}
    for reduce in ("ordered", "sums"):
        with pytest.raises(FloatingPointError, match="loss: nan"):  # on the process that has it and on the other
            evaluate_domains(Fixed(), broken, loss=Fixed(), reduce=reduce)
    return fixed_losses(rank, folder), sharded_losses(rank, folder)


def agree(found):
    ordered, sums = found
    by_one_ordered, by_one_sums = fixed_losses(0, None)
    for mine, expected in zip(ordered, by_one_ordered, strict=True):
        assert (mine == expected).all()  # to the bit
    for mine, expected in zip(sums, by_one_sums, strict=True):
        assert mine == pytest.approx(expected, rel=1e-12)


def test_three_processes_change_nothing(tmp_path):
    for found in on_ranks(3, fixed_losses, tmp_path):
        agree(found)


def test_two_processes_and_wrapped_models(tmp_path):
    """Sets of 9 and 5 sequences of unlike lengths: who has fewer keeps step with the other under fully_shard."""
    (fixed, on_first), (also_fixed, on_second) = on_ranks(2, on_two, tmp_path)
    agree(fixed)
    agree(also_fixed)
    (plain, plain_after), *wrapped = on_first
    assert abs(plain.loss - plain_after.loss).min() > 1e-3
    for before, after in wrapped:
        assert before.loss == pytest.approx(plain.loss, rel=1e-6)
        assert after.loss == pytest.approx(plain_after.loss, rel=1e-6)
    for first, second in zip(on_first, on_second, strict=True):
        assert (first[1].loss == second[1].loss).all()


def test_the_model_is_left_as_it_was():
    model = language_model("llama").train()
    model.model.layers[0].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    evaluate_domains(model, SETS)
    assert [m.training for m in model.modules()] == modes
    assert (torch.get_rng_state() == random).all()
    assert (model.lm_head.weight.grad == 1).all()
    assert "forward" not in model.lm_head.__dict__


def test_dropout_is_off():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=8, n_layer=1, n_head=1)
    model = transformers.GPT2LMHeadModel(config).train()
    assert (evaluate_domains(model, SETS).loss == evaluate_domains(model, SETS).loss).all()


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_logits_are_made_some_rows_at_a_time(rows):
    model, most = language_model("llama").eval(), []
    loss = NextTokenLoss(model, rows=rows)
    expected = NextTokenLoss(model)(SETS["code"])
    model.lm_head.register_forward_hook(lambda module, inputs, output: most.append(output.numel()))
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: most.append(forward(hidden).numel()) or forward(hidden)
    with torch.no_grad():
        loss(SETS["code"][:1])  # runs one sequence whole, to compare
        most.clear()
        found = loss(SETS["code"])
    assert max(most) <= max(rows * VOCABULARY, 20)  # hooks see logits of no classes
    assert found.losses.tolist() == pytest.approx(expected.losses.tolist(), rel=1e-12)
    assert model.lm_head.forward is not forward  # what was put in the head's place is there again


class Capped(nn.Module):
    """A model that caps its logits after the head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lm_head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, ids):
        return 2 * torch.tanh(self.lm_head(self.embed(ids)) / 2)


def test_models_that_change_their_logits_are_run_whole_and_that_is_said():
    model = Capped()
    with pytest.warns(UserWarning, match="head: the model does not return its output as it is"):
        found = evaluate_domains(model, SETS)
    x = SETS["code"]
    with torch.no_grad():
        expected = sum(F.cross_entropy(model(row[None])[0, :-1], row[1:], reduction="sum") for row in x)
    assert found.loss[0] == pytest.approx(float(expected) / sum(len(row) - 1 for row in x), rel=1e-6)
    model.lm_head, model.other = nn.Identity(), model.lm_head
    model.forward = lambda ids: model.other(model.embed(ids))
    del model.lm_head
    with pytest.warns(UserWarning, match="head: none was found"):
        evaluate_domains(model, SETS)


def test_labels_say_which_targets_count():
    model, x = language_model("llama").eval(), SETS["code"][0]
    labels = x.clone()
    labels[:3] = -100
    sums = NextTokenLoss(model)([{"input_ids": x, "labels": labels}, x])
    with torch.no_grad():
        each = F.cross_entropy(model(x[None]).logits[0, :-1], x[1:], reduction="none")
    assert sums.tokens.tolist() == [len(x) - 3, len(x) - 1]
    assert sums.losses.tolist() == pytest.approx([float(each[2:].sum()), float(each.sum())], rel=1e-12)


def test_progress_is_told():
    told = []
    evaluate_domains(Fixed(), {"a": clusters(5, 0)}, loss=Fixed(), batch=2, progress=lambda *all: told.append(all))
    assert told == [("a", 2, 5), ("a", 4, 5), ("a", 5, 5)]


def test_what_cannot_be_evaluated_is_named():
    with pytest.raises(ValueError, match="expected at least two sequences of 'a', got 1"):
        evaluate_domains(Fixed(), {"a": clusters(1, 0)}, loss=Fixed())
    with pytest.raises(FloatingPointError, match="loss: nan for sequence 3 of domain 'a'"):
        evaluate_domains(Fixed(), {"a": [*clusters(3, 0), (float("nan"), 4)]}, loss=Fixed(), batch=2)
    with pytest.raises(ValueError, match="expected tokens that count in 'a', got none"):
        evaluate_domains(Fixed(), {"a": [(0.0, 0)] * 2}, loss=Fixed())
    with pytest.raises(ValueError, match="reduce: expected"):
        evaluate_domains(Fixed(), FIXED, loss=Fixed(), reduce="mean")
    with pytest.raises(ValueError, match=r"sequence: expected \(T,\) token numbers"):
        NextTokenLoss(language_model("llama"))([torch.zeros(2, 3)])


def test_sequences_that_are_trained_on_are_found():
    train = [SETS["code"][4], torch.arange(9)]
    again = {"code": SETS["code"], "prose": [*SETS["prose"], SETS["code"][0]]}
    assert duplicates(again, train) == {"code": [4], "prose": [5]}
    assert duplicates(SETS, []) == {}
