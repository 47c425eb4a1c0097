"""A reference's loss is one token-weighted mean, whichever way it is cut; a task's loss knows no neighbours."""

import pytest
import torch
import torch.nn.functional as F

from algorithms.mates.models import TASK, bits, bytes_of, documents, reference, same_bits, trained
from ghostgram.algorithms.mates.labels.reference import Reference, overlapping
from ghostgram.algorithms.mates.labels.task import Task, padded


def by_hand(model, ids, mask):
    """Loss sums of rows, one target at a time."""
    sums = []
    for row, targets in zip(ids, mask, strict=True):
        terms = [
            -F.log_softmax(model(row[None, :t]).squeeze(0)[-1], -1)[row[t]] for t in range(1, len(row)) if targets[t]
        ]
        sums.append(torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64))
    return torch.stack(sums)


def test_losses_are_means_over_each_rows_targets():
    model, _ = trained()
    ids, mask = bytes_of(documents(5, 3))
    mask[1] = False
    mask[2] = False
    mask[2, 2] = True
    mask[:, 0] = True  # which nothing predicts
    counts = mask[:, 1:].sum(1)
    sums, seen = TASK.sums(model, ids, mask)
    assert torch.equal(seen, counts)
    assert counts[1:3].tolist() == [0, 1]
    assert torch.allclose(sums, by_hand(model, ids, mask), rtol=1e-12, atol=0)
    assert torch.allclose(TASK.losses(model, ids, mask), sums / counts.clamp(min=1), rtol=1e-15, atol=0)
    assert TASK.losses(model, ids, mask)[1] == 0


def test_a_document_does_not_know_its_neighbours():
    model, _ = trained()
    texts = documents(6, 4)
    together = TASK.losses(model, *bytes_of(texts))
    alone = torch.cat([TASK.losses(model, *bytes_of([text])) for text in texts])
    assert torch.allclose(together, alone, rtol=1e-12, atol=0)


def test_columns_without_targets_are_not_computed():
    widths = []
    task = Task(bytes_of, lambda model, ids: (widths.append(ids.shape[1]), model(ids))[1])
    model, _ = trained()
    ids, mask = bytes_of(documents(4, 5, longest=8))
    wider, mask_wider = F.pad(ids, (0, 9)), F.pad(mask, (0, 9))
    assert torch.equal(task.losses(model, wider, mask_wider), task.losses(model, ids, mask))
    assert widths[0] == widths[1] == int(mask.any(0).nonzero().max())


@pytest.mark.parametrize("texts", [[""], ["a", ""], ["ab", ""]])
def test_texts_too_short_to_predict_have_a_loss_of_zero_and_a_gradient(texts):
    model, _ = trained()
    losses = TASK.losses(model, *bytes_of(texts))
    losses.sum().backward()
    assert losses[-1] == 0
    assert (losses[0] > 0) == (texts[0] == "ab")
    one = TASK.losses(model, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool))
    assert one.tolist() == [0]


def test_logits_are_taken_to_float32():
    model, _ = trained(dtype=torch.bfloat16)
    assert TASK.losses(model, *bytes_of(documents(2, 6))).dtype == torch.float32


def test_a_tokenizer_makes_a_task():
    def tokenizer(texts, truncation, max_length):
        assert truncation
        return {"input_ids": [list(text.encode())[:max_length] for text in texts]}

    ids, mask = Task.from_tokenizer(tokenizer, 4).encode(["abcdef", "x", ""])
    assert ids.tolist() == [[97, 98, 99, 100], [120, 0, 0, 0], [0, 0, 0, 0]]
    assert mask.tolist() == [[False, True, True, True], [False] * 4, [False] * 4]
    with pytest.raises(ValueError, match="length: expected at least 2"):
        Task.from_tokenizer(tokenizer, 1)


def test_no_way_of_cutting_changes_the_loss():
    """Nor its gradient; the release's mean of batch means does change with the order."""
    model, _ = trained()
    whole = Reference.from_texts("r", documents(70, 7, shortest=3), TASK)
    truth = by_hand(model, whole.ids, whole.mask).sum() / whole.tokens
    losses = [whole.loss(model, TASK, batch) for batch in (1, 7, 32, 70)]
    assert max(abs(loss - truth) for loss in losses) <= 1e-12
    backwards = Reference("r", whole.ids.flip(0), whole.mask.flip(0))
    assert abs(backwards.loss(model, TASK) - truth) <= 1e-12
    release = [each.loss(model, TASK, batch, "mates_release") for each in (whole, backwards) for batch in (5, 32)]
    assert release[0] == pytest.approx(release[1], abs=1e-12)
    assert abs(release[0] - truth) > 1e-6
    assert abs(release[0] - release[2]) > 1e-6
    with pytest.raises(ValueError, match="reduction: expected 'tokens' or 'mates_release'"):
        whole.loss(model, TASK, reduction="mean")


def test_the_gradient_is_that_of_the_loss():
    model, optimizer = trained()
    r = reference()
    model.train()
    model.token.weight.grad = torch.ones_like(model.token.weight)
    before = bits(model, optimizer)
    gradients = [r.gradient(model, TASK, batch) for batch in (5, 12)]
    assert model.training
    assert (model.token.weight.grad == 1).all()
    assert model.norm.bias.grad is None
    assert same_bits(bits(model, optimizer), before)
    loss = TASK.sums(model, r.ids, r.mask)[0].sum() / r.tokens
    truth = torch.autograd.grad(loss, list(model.parameters()))
    for p, expected in zip(model.parameters(), truth, strict=True):
        assert all(torch.allclose(g[p], expected, rtol=1e-10, atol=1e-14) for g in gradients)


def test_references_that_share_words_with_an_evaluation_are_refused():
    shared = " ".join(f"w{i}" for i in range(13))
    texts, judged = ["one two three", f"So: {shared.upper()}!"], {"exam": [f"x {shared} y"], "other": ["one two three"]}
    with pytest.raises(ValueError, match=r"1 of 2 examples of reference 'r' share 13 words .* set 'exam'"):
        Reference.from_texts("r", texts, TASK, evaluation=judged)
    assert Reference.from_texts("r", texts, TASK, evaluation=judged, allow_overlap=True).ids.shape[0] == 2
    assert overlapping([shared], [shared.replace("w6", "v6")]) == []


@pytest.mark.parametrize(("changes", "message"), [
    (dict(name="a b"), "name: expected letters"),
    (dict(ids=torch.zeros(2, 3)), "ids: expected .* int64"),
    (dict(mask=torch.ones(2, 4, dtype=torch.bool)), r"mask: expected bool of shape \(2, 3\)"),
    (dict(mask=torch.tensor([[True, False, False]] * 2)), "expected a target in reference 'r'"),
])  # fmt: skip
def test_references_that_cannot_be_are_refused(changes, message):
    ids, mask = padded([torch.arange(3)] * 2)
    with pytest.raises(ValueError, match=message):
        Reference(**{"name": "r", "ids": ids, "mask": mask} | changes)


def test_tasks_say_what_they_were_given():
    model, _ = trained()
    ids, mask = bytes_of(["abc"])
    with pytest.raises(ValueError, match=r"expected .B, T. and a bool mask"):
        TASK.losses(model, ids, mask.float())
    with pytest.raises(ValueError, match=r"logits: expected shape \(1, 2, V\), got \(1, 1, 256\)"):
        Task(bytes_of, lambda model, ids: model(ids)[:, -1:]).losses(model, ids, mask)
