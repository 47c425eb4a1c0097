"""Every front door called once or more, with inputs that fit all of them. Needs no torch."""

import numpy as np

import ghostgram as gg


def arrays(make=np.asarray, samples=3, tokens=5, d=6, p=4, directions=2, dtype=np.float32, seed=0):
    """One set of inputs that fits every front door."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: make(rng.standard_normal(shape).astype(dtype))  # noqa: E731
    return {
        "a": normal(samples, tokens, d),
        "b": normal(samples, tokens, p),
        "a2": normal(2, tokens + 1, d),
        "b2": normal(2, tokens + 1, p),
        "D": normal(directions, p, d),
        "ids": make(rng.integers(0, 7, (samples, tokens)).astype(np.int32)),
        "unique": make(rng.permutation(samples * tokens).astype(np.int32).reshape(samples, tokens) - 7),
        "table": normal(directions, 7, p),
        "x": normal(samples, tokens, p),
        "mean": normal(samples, tokens),
        "rstd": normal(samples, tokens),
        "row": normal(directions, p),
        "groups": normal(samples, 1),
        "channels": normal(directions, tokens),
        "P_out": normal(5, p),
        "P_in": normal(7, d),
        "logits": normal(samples, tokens, 7),
        "soft": make(rng.random((samples, tokens, 7)).astype(dtype)),
        "clip": make(rng.random(samples).astype(dtype)),
        "m": normal(p, d),
        "v": make(rng.random((p, d)).astype(dtype)),
    }


ADAM = (1e-3, 0.9, 0.95, 1e-8, 0.4, 0.2)
"""The scalars of an AdamW step."""


DOORS = {
    "grad_norms": lambda v: gg.grad_norms(v["a"], v["b"]),
    "grad_dots": lambda v: gg.grad_dots(v["a"], v["b"], v["D"]),
    "grad_gram": lambda v: gg.grad_gram(v["a"], v["b"]),
    "grad_gram of two": lambda v: gg.grad_gram(v["a"], v["b"], v["a2"], v["b2"]),
    "grad_stats": lambda v: gg.grad_stats(v["a"], v["b"], v["D"]),
    "embedding_stats": lambda v: gg.embedding_stats(v["ids"], v["b"], v["table"], padding_idx=2),
    "affine_stats": lambda v: gg.affine_stats(v["b"], v["x"], v["mean"], v["rstd"], v["row"], v["row"]),
    "affine_stats channels first": lambda v: gg.affine_stats(
        v["b"], v["x"], v["groups"], 2 + v["groups"], v["channels"], v["channels"], channels_first=True
    ),
    "affine_stats of a bias": lambda v: gg.affine_stats(v["b"], D_bias=v["row"]),
    "grad_project": lambda v: gg.grad_project(v["a"], v["b"], v["P_out"], v["P_in"]),
    "grad_project at random": lambda v: gg.grad_project(v["a"], v["b"], 3, 2, distribution="gaussian", seed=5),
    "grad_sketch": lambda v: gg.grad_sketch(v["a"], v["b"], 11, nonzeros=2, seed=5, layer=1),
    "softmax_stats": lambda v: gg.softmax_stats(v["logits"], v["ids"], ignore_index=3),
    "softmax_stats of distributions": lambda v: gg.softmax_stats(v["logits"], v["soft"]),
    "el2n": lambda v: gg.el2n(v["logits"], v["ids"]),
    "trajectory_match": lambda v: gg.trajectory_match(
        [v["b"], v["row"]], [v["x"], 2 * v["row"]], [3 * v["x"], v["row"] - 1], mask=1
    ),
    "adam_dots": lambda v: 1e3 * gg.adam_dots(v["a"], v["b"], v["clip"], v["m"], v["v"], v["D"], ADAM),
    "adam_dots of one direction": lambda v: gg.adam_dots(v["a"], v["b"], v["clip"], v["m"], v["v"], v["D"][0], ADAM),
}


def results(found):
    """The arrays a front door returned."""
    return [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]


def draws(v):
    """What gumbel_topk of the numbers in a row gives, with ids and without."""
    scores, ids = v["mean"].reshape(-1), v["unique"].reshape(-1)
    return (
        gg.gumbel_topk(scores, 4, seed=5),
        gg.gumbel_topk(scores, 99, ids=ids, seed=2**64 - 1, temperature=0.5),
        gg.gumbel_topk(scores, 0),
    )


def matched(v):
    """The loss of trajectory_match_grad and the gradient of each tensor, under a mask for every scalar."""
    found = gg.trajectory_match_grad([v["b"], v["row"]], [v["x"], 2 * v["row"]], [3 * v["x"], v["row"] - 1], [2, 0.5])
    return (found.loss, *found.gradient)


EVERY = DOORS | {
    "gumbel_topk": draws,
    "trajectory_match_grad": matched,
    "trajectory_match of a masked array": lambda v: gg.trajectory_match(v["b"], v["x"], 3 * v["x"], v["x"] > -1),
    "grad_stats without directions": lambda v: gg.grad_stats(v["a"], v["b"]),
    "embedding_stats without directions": lambda v: gg.embedding_stats(v["ids"], v["b"]),
}
"""Also those whose results are not all float32."""
