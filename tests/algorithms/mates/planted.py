"""Texts whose influence is known: a linear function of their words, in nats, with noise."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def documents(count, seed, shortest=20, longest=80):
    """Texts of words drawn from a mixture of four topics, one mixture a text."""
    generator = np.random.default_rng(seed)
    topics = generator.permuted(np.tile(1 / np.arange(1, len(WORDS) + 1), (4, 1)), axis=1)
    topics /= topics.sum(1, keepdims=True)
    texts = []
    for _ in range(count):
        mixture = generator.dirichlet(np.full(4, 0.5)) @ topics
        drawn = generator.choice(len(WORDS), generator.integers(shortest, longest), p=mixture / mixture.sum())
        texts.append(" ".join(WORDS[i] for i in drawn))
    return texts, [blake2b(f"{seed} {i}".encode(), digest_size=16).digest() for i in range(count)]


def influences(texts, seed, noise=0.0, scale=1e-3, offset=5e-4):
    """(n, 1) nats: the mean of the words' weights and of a few pairs', standardised, with noise of this share."""
    generator = np.random.default_rng(seed)
    weights = dict(zip(WORDS, generator.normal(size=len(WORDS)), strict=True))
    values = np.array([np.mean([weights[word] for word in text.split()]) for text in texts])
    values = (values - values.mean()) / values.std() + noise * generator.normal(size=len(texts))
    return (offset + scale * values)[:, None]
