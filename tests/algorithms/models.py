"""Models and data small enough to enumerate subsets on, and what the tests of In-Run Data Shapley do with them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, LENGTH, BATCH = 61, 11, 6


def language_model(kind, dtype=torch.float64):
    transformers = pytest.importorskip("transformers")
    family, _, tied = kind.partition(" ")
    shared = {"vocab_size": VOCABULARY, "tie_word_embeddings": bool(tied), "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_positions=32, n_embd=24, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **shared
        )
        return transformers.GPT2LMHeadModel(config).to(dtype)
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **shared,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def lm_loss(model, ids, reduction="mean"):
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


def sentences(count, seed):
    return torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


class Small(nn.Module):
    """A model small enough to enumerate subsets on."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 1)
        self.to(dtype)

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x)))).squeeze(-1)


def regression(count, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=g, dtype=dtype)
    return x, torch.sin(x.sum(1)) + 0.1 * torch.randn(count, generator=g, dtype=dtype)


def mse(model, batch, reduction="mean"):
    return F.mse_loss(model(batch[0]), batch[1], reduction=reduction)


def adam_P(optimizer, p, group, clip=1.0):
    """P of AdamW from the second moment before the step, written out."""
    state, (b1, b2) = optimizer.state[p], group["betas"]
    t = float(state["step"]) + 1
    return (
        clip
        * group["lr"]
        * (1 - b1)
        / (1 - b1**t)
        / ((state["exp_avg_sq"] / (1 - b2 ** (t - 1))).sqrt() + group["eps"])
        * (state["exp_avg_sq"] > 0)
    )


def phis(shapley):
    log = shapley.step_log()
    return np.stack([log[c].to_numpy() for c in log.column_names if c.startswith("phi_")], 1).astype(np.float64)


def warmed(model, optimizer, loss):
    """One plain step, so that Adam has a second moment."""
    loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def run_steps(model, optimizer, shapley, count, scored=True, clip=None):
    for number in range(count):
        batch = regression(5, 10 + number)
        if scored:
            with shapley.step(ids=range(5 * number, 5 * number + 5)):
                mse(model, batch).backward()
        else:
            mse(model, batch).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
