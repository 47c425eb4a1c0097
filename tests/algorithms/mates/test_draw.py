"""The draw is Plackett-Luce, or the release's, and its noise belongs to the document."""

import numpy as np
import pyarrow as pa
import pytest

import ghostgram as gg
from algorithms.mates.scored import chosen, ids_of, keys_by_definition, pool, table, words
from ghostgram.algorithms.mates.selection import streams
from ghostgram.algorithms.mates.selection.candidates import Keys
from ghostgram.algorithms.mates.selection.select import select
from ghostgram.reference import gumbel_topk as reference

Z = np.array([1.5, 0.8, 0.3, -0.2, -0.8, -1.6])
PLACKETT_LUCE = {
    1: [0.7232, 0.1783, 0.0656, 0.0241, 0.0073, 0.0015],
    3: [0.9965, 0.9277, 0.6976, 0.2760, 0.0850, 0.0173],
}
RELEASE = {1: [0.780, 0.179, 0.037, 0.004, 0, 0], 3: [0.976, 0.901, 0.737, 0.326, 0.059, 0.002]}


def frequencies(noise, temperature, draws=400_000):
    """How often each of six documents is among the first 1 and 3, by the keys that `select` gives a pool."""
    rule = Keys(temperature, noise, streams.stream(0, 0, "gumbel"))
    ids = np.arange(6 * draws, dtype=np.uint64)  # as many independent draws as there are seeds
    fed = rule.feed(np.tile(Z, draws), ids)
    if noise == "gumbel":
        fed = fed / temperature + streams.gumbel(ids, rule.stream)
    order = np.argsort(-fed.reshape(draws, 6), axis=1)
    return {k: np.bincount(order[:, :k].ravel(), minlength=6) / draws for k in (1, 3)}


def test_inclusion_is_plackett_luce():
    for k, found in frequencies("gumbel", 0.5).items():
        assert np.abs(found - PLACKETT_LUCE[k]).max() < 0.003, k


def test_the_release_is_greedier_and_no_plackett_luce_draw():
    for k, found in frequencies("mates_release", 0.5).items():
        assert np.abs(found - RELEASE[k]).max() < 0.003, k
        assert np.abs(found - PLACKETT_LUCE[k]).max() > 0.04, k


def test_whole_orders_pass_a_chi_square_test():
    """600 stages choose 2 of 5 in order of keys: 20 ordered pairs against their Plackett-Luce probabilities."""
    z, stages = np.array([1.2, 0.5, 0.0, -0.4, -1.3], np.float32), 600
    scored = table(ids_of(range(5)), z)
    place = {id: number for number, id in enumerate(scored["doc_id"].to_pylist())}
    observed = np.zeros((5, 5))
    for stage in range(stages):
        plan = select([scored], docs=2, stage=stage, standardise="none").table.sort_by([("key", "descending")])
        first, second = (place[id] for id in plan["doc_id"].to_pylist())
        observed[first, second] += 1
    weight = np.exp(z.astype(np.float64))
    expected = stages * (weight / weight.sum())[:, None] * weight / (weight.sum() - weight[:, None])
    np.fill_diagonal(expected, 1)
    np.fill_diagonal(observed, 1)
    assert ((observed - expected) ** 2 / expected).sum() < 43.8  # 19 degrees of freedom: passed by 99.9 %


@pytest.mark.parametrize(
    ("sd", "temperature", "noise", "mean"),
    [
        (1.0, 1.0, "mates_release", 1.01), (1.0, 1.0, "gumbel", 0.78),
        (1.0, 0.5, "mates_release", 1.24), (1.0, 0.5, "gumbel", 1.14),
        (0.5, 0.5, "mates_release", 1.01), (0.5, 0.5, "gumbel", 0.78),
        (0.5, 1.0, "mates_release", 0.68), (0.5, 1.0, "gumbel", 0.43),
        (1.0, 0.0, "gumbel", 1.40),
    ],
)  # fmt: skip
def test_mean_z_of_a_fifth(large, sd, temperature, noise, mean):
    z = large["z_ref"].to_numpy()
    scored = large.set_column(large.schema.get_field_index("z_ref"), "z_ref", pa.array(z * np.float32(sd)))
    plan = select([scored], ratio=0.2, temperature=temperature, noise=noise, standardise="none")
    assert len(plan) == len(z) // 5
    assert plan.report["mean_z"] == pytest.approx(mean, abs=0.01)
    assert plan.report["effective_temperature"] == pytest.approx(temperature / sd, rel=0.01)


@pytest.fixture(scope="module")
def large():
    n = 400_000
    raw = np.random.default_rng(3).bytes(16 * n)
    ids = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), n, [None, pa.py_buffer(raw)])
    return table(ids, np.random.default_rng(4).standard_normal(n))


def test_it_is_the_draw_by_definition():
    scored = pool(3_000)
    stream = streams.stream(7, 2, "gumbel")
    for sign, noise in ((1, "gumbel"), (-1, "mates_release")):
        keys, order = keys_by_definition(scored, stream, 0.7, sign)
        plan = select([scored], docs=400, temperature=0.7, seed=7, stage=2, noise=noise)
        by_id = dict(zip(scored["doc_id"].to_pylist(), keys, strict=True))
        assert {*chosen(plan)} == {scored["doc_id"][int(row)].as_py() for row in order[:400]}
        np.testing.assert_allclose(plan.table["key"], [by_id[id] for id in chosen(plan)], rtol=1e-5)  # rounded to 2^-20
    assert {*chosen(plan)} != {*chosen(select([scored], docs=400, temperature=0.7, seed=7, stage=3, noise=noise))}
    assert {*chosen(plan)} != {*chosen(select([scored], docs=400, temperature=0.7, seed=8, stage=2, noise=noise))}


def test_noise_is_the_rooms_and_belongs_to_the_document():
    key = streams.stream(3, 1, "gumbel")
    ids = words(ids_of(range(1000)))[:, 0].copy()
    noise = streams.gumbel(np.concatenate([ids, ids[:100]]), key)
    np.testing.assert_array_equal(noise[:100], noise[1000:])
    np.testing.assert_array_equal(streams.gumbel(ids[::-1][:10], key), noise[:1000][::-1][:10])
    np.testing.assert_allclose(noise[:1000], reference.noise(ids, key), rtol=4 * 2**-52, atol=4 * 2**-52)
    top = gg.GumbelTopK(1000, seed=key)
    top.update(np.zeros(1000), ids)
    kept, keys = top.result()
    assert dict(zip(kept, keys, strict=True)) == dict(zip(ids, noise[:1000], strict=True))
    for other in (streams.stream(4, 1, "gumbel"), streams.stream(3, 2, "gumbel"), streams.stream(3, 1, "order")):
        assert not np.isclose(streams.gumbel(ids, other), noise[:1000]).any()
