"""A mixture that trains in a moment: rows of three Markov chains, and a model of pairs of tokens."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ghostgram.algorithms.velocitune.rules.velocitune import Velocitune
from ghostgram.algorithms.velocitune.run import velocitune
from ghostgram.algorithms.velocitune.targets import Targets

VOCABULARY, LENGTH = 12, 16
SIZES = {"prose": 40, "code": 30, "maths": 20}
BATCH, TOKENS = 6, 6 * 16 * 24  # 24 batches


def chain(seed, rows, sharpness):
    """Rows of tokens, each drawn by the one before; a sharper chain has a lower entropy."""
    rng = np.random.default_rng(seed)
    steps = torch.softmax(sharpness * torch.tensor(rng.normal(size=(VOCABULARY, VOCABULARY))), 1).numpy()
    tokens = np.empty((rows, LENGTH), np.int64)
    tokens[:, 0] = rng.integers(0, VOCABULARY, rows)
    for t in range(1, LENGTH):
        tokens[:, t] = [rng.choice(VOCABULARY, p=steps[last]) for last in tokens[:, t - 1]]
    return torch.tensor(tokens)


CHAINS = {name: chain(k, 60, sharpness) for k, (name, sharpness) in enumerate(zip(SIZES, (1.0, 2.0, 3.0), strict=True))}
TRAINING = {name: CHAINS[name][:size] for name, size in SIZES.items()}
HELD_OUT = {name: rows[44:] for name, rows in CHAINS.items()}


class Pairs(nn.Module):
    """Logits of the next token from the last one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.lm_head = nn.Linear(8, VOCABULARY)

    def forward(self, ids):
        return self.lm_head(self.embedding(ids))


def model_and_optimizer():
    torch.manual_seed(0)
    model = Pairs()
    return model, torch.optim.Adam(model.parameters(), 3e-2)


def sequence_losses(model, rows):
    """(n,) summed token losses."""
    logits = model(rows)[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").sum(1)


def targets(l_init=2.6, reached=(2.3, 2.0, 1.5)):
    names = list(SIZES)
    return Targets.given(names, [l_init] * 3, reached, se_init=0.02, se_target=0.02)


def sampler(model, *, rule=None, folder=None, **options):
    """The public function on these domains; "paper", an update every fourth batch."""
    given = {"tokens": TOKENS, "global_batch": BATCH, "interval": 1 / 6, "log": folder} | options
    chosen = Velocitune(targets(), "paper") if rule is None else rule
    return velocitune(TRAINING, model, HELD_OUT, rule=chosen, **given)


def train(model, optimizer, data, *, stop=None):
    """Trains on what the sampler gives; the (domain, sample) ids of every batch, and the state after batch `stop`."""
    seen = []
    for batch in data:
        loss = sequence_losses(model, batch.data)
        (loss.sum() / (len(loss) * (LENGTH - 1))).backward()
        optimizer.step()
        optimizer.zero_grad()
        data.report(loss)
        seen.append(list(zip(batch.domain_ids.tolist(), batch.sample_ids.tolist(), strict=True)))
        if batch.number == stop:
            return seen, data.state_dict()
    return seen, None
