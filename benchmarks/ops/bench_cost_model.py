"""The cost model's regret: how much longer the way it chose took than the best one, on shapes it was not fitted to."""

from __future__ import annotations

import dataclasses

from ways import HELD_OUT, WAYS, Shape, grid, measure

from ghostgram.ops.cost_model import choose_way

BAR = 0.10  # mean regret


def chosen(shape: Shape) -> str:
    """What the cost model says."""
    want, *sizes = dataclasses.astuple(shape)
    return choose_way(want, WAYS[want], *sizes)


def memory_rule(shape: Shape) -> str:
    """What 2 T T2 <= d p would say, that counts elements stored; dots have no such rule."""
    other = "P" if shape.want == "dots" else "G"
    tokens2 = shape.second[1] if shape.second else shape.tokens
    return other if shape.want == "dots" or 2 * shape.tokens * tokens2 <= shape.d * shape.p else "M"


def bench_regret(benchmark, rows, record):
    shapes = [shape for want in WAYS for shape in grid(want, HELD_OUT)]
    benchmark(lambda: [chosen(shape) for shape in shapes])  # pytest-benchmark's own table shows what choosing costs
    if benchmark.disabled:
        return

    regrets = []
    for shape, took in zip(shapes, measure(shapes), strict=True):
        other = next(way for way in took if way != "M")
        rules = {"model": chosen(shape), "memory_rule": memory_rule(shape), "always_m": "M", "always_other": other}
        regrets.append({name: took[way] / min(took.values()) - 1 for name, way in rules.items()})
        times = {f"{way}_ms": 1e3 * t for way, t in took.items()}
        rows.append(
            dataclasses.asdict(shape)
            | {"threads": 1}
            | times
            | {"chosen": rules["model"], "regret": regrets[-1]["model"]}
        )
    for want in (*WAYS, "all"):
        some = [found for shape, found in zip(shapes, regrets, strict=True) if want in (shape.want, "all")]
        cells = {}
        for rule in some[0]:
            found = [regret[rule] for regret in some]
            cells |= {f"{rule}_mean": sum(found) / len(found), f"{rule}_worst": max(found)}
        record(regret_of=want, shapes=len(some), **cells)
    assert cells["model_mean"] <= BAR
