"""Causal language models of a few thousand weights, trained a little, and what they read."""

import torch
from tiny_lm import TinyLM
from torch import nn

from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.algorithms.mates.labels.task import Task, padded

SYMBOLS = 256


def bytes_of(texts):
    return padded([torch.tensor(list(text.encode())[:24], dtype=torch.int64) for text in texts])


TASK = Task(bytes_of)


def documents(count, seed, shortest=6, longest=16, letters=20):
    """Texts of a few letters, some of which follow others, so that there is something to learn."""
    g = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (), generator=g))
        letter, found = int(torch.randint(letters, (), generator=g)), []
        for _ in range(length):
            found.append(chr(97 + letter))
            jump = int(torch.randint(3, (), generator=g))
            letter = int(torch.randint(letters, (), generator=g)) if jump == 0 else (letter * 3 + jump) % letters
        texts.append("".join(found))
    return texts


def reference(count=12, seed=1, name="kept"):
    return Reference.from_texts(name, documents(count, seed), TASK)


def trained(kind=torch.optim.AdamW, steps=6, dtype=torch.float64, grouped=False, lr=3e-3, build=TinyLM, **settings):
    """(model, optimizer) after some steps with gradients clipped at 1, on batches of 8."""
    torch.manual_seed(0)
    model = build(width=16, layers=1, heads=2, context=24).to(dtype)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for _, p in named if p.dim() > 1]
    vectors = [p for _, p in named if p.dim() == 1]
    groups = (
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": lr / 2}]
        if grouped
        else [*matrices, *vectors]
    )
    optimizer = kind(groups, lr=lr, **settings)
    for step in range(steps):
        TASK.losses(model, *bytes_of(documents(8, 100 + step))).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def bits(model, optimizer):
    """Everything that an update may move, copied."""
    tensors = {f"model.{n}": t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for kind, value in optimizer.state.get(p, {}).items():
            tensors[f"state.{i}.{kind}"] = torch.as_tensor(value).clone()
    return tensors | {"random": torch.get_rng_state()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
