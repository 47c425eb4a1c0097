"""The draw is Plackett-Luce, the plan is the same however the pool lies, and no budget is overrun."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ghostgram as gg
from algorithms.mates.scored import chosen, ids_of, keys_by_definition, pool, table, words
from ghostgram.algorithms.mates.selection import streams
from ghostgram.algorithms.mates.selection.candidates import Keys
from ghostgram.algorithms.mates.selection.plan import Plan
from ghostgram.algorithms.mates.selection.select import select
from ghostgram.algorithms.mates.sums import ExactSums, add_by_group
from ghostgram.reference import gumbel_topk as reference

Z = np.array([1.5, 0.8, 0.3, -0.2, -0.8, -1.6])
PLACKETT_LUCE = {
    1: [0.7232, 0.1783, 0.0656, 0.0241, 0.0073, 0.0015],
    3: [0.9965, 0.9277, 0.6976, 0.2760, 0.0850, 0.0173],
}
RELEASE = {1: [0.780, 0.179, 0.037, 0.004, 0, 0], 3: [0.976, 0.901, 0.737, 0.326, 0.059, 0.002]}


def bytes_of(plan, *without):
    sink = pa.BufferOutputStream()
    kept = plan.table.drop_columns(list(without))
    with pa.ipc.new_stream(sink, kept.schema) as writer:
        writer.write_table(kept)
    return sink.getvalue().to_pybytes()


def shards_of(scored, count, seed):
    """The rows in another order, dealt into shards."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(scored))
    return [scored.take(pa.array(part)) for part in np.array_split(order, count)]


# The distribution


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


# The same plan


@pytest.mark.parametrize("noise", ["gumbel", "mates_release"])
def test_the_plan_does_not_depend_on_shards_or_order(noise):
    scored = pool(8_000, cluster=pa.array(np.random.default_rng(1).integers(0, 6_000, 8_000)))
    for options in (
        {"docs": 1_500},
        {"tokens": 150_000},
        {"ratio": 0.1, "standardise": "domain"},
        {"tokens": 150_000, "quotas": {"wiki": (0.3, 0.5), "web": 0.2}},
        {"docs": 1_500, "one_per": "cluster"},
        {"tokens": 150_000, "one_per": "cluster", "quotas": {"wiki": (0.1, 0.2)}},
    ):
        whole = select([scored], noise=noise, **options)
        for count in (1, 3, 7, 64):
            plan = select(shards_of(scored, count, count), noise=noise, **options)
            assert bytes_of(plan, "shard", "row") == bytes_of(whole, "shard", "row"), (options, count)
            assert plan.report == whole.report


def test_files_tables_batches_and_threads_give_the_same_plan(tmp_path):
    scored = pool(5_000)
    shards = shards_of(scored, 3, 0)
    paths = [tmp_path / f"{number}.parquet" for number in range(3)]
    for path, shard in zip(paths, shards, strict=True):
        pq.write_table(shard, path, row_group_size=700)
    batches = [shard.combine_chunks().to_batches()[0] for shard in shards]
    plan = select(shards, tokens=50_000)
    plan.write(tmp_path / "tables")
    for name, scores in (("paths", paths), ("batches", batches), ("strings", [f"file://{path}" for path in paths])):
        select(scores, tokens=50_000).write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == (tmp_path / "tables").read_bytes()
    script = (
        "import sys; from ghostgram.algorithms.mates.selection.select import select; "
        "select(sys.argv[1:4], tokens=50_000).write(sys.argv[4])"
    )
    done = [sys.executable, "-c", script, *map(str, paths), str(tmp_path / "one thread")]
    subprocess.run(done, env=os.environ | {"GHOSTGRAM_NUM_THREADS": "1"}, check=True)
    assert (tmp_path / "one thread").read_bytes() == (tmp_path / "tables").read_bytes()
    for name, row, id in zip(*(plan.table[name].to_pylist() for name in ("shard", "row", "doc_id")), strict=True):
        assert shards[name]["doc_id"][row].as_py() == id


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


def test_scaled_scores_leave_the_plan_and_none_does_not():
    scored = pool(10_000)
    z = scored["z_ref"].to_numpy()
    scaled = scored.set_column(scored.schema.get_field_index("z_ref"), "z_ref", pa.array(3 * z + 2))
    for standardise, same in (("pool", True), ("domain", True), ("none", False)):
        plans = [select([held], docs=1_000, standardise=standardise) for held in (scored, scaled)]
        assert (chosen(plans[0]) == chosen(plans[1])) == same, standardise


def test_domains_are_standardised_apart():
    """Where one domain scores 10 higher, it takes all of the pool's draw, and its share of the domains' draw."""
    scored = pool(6_000)
    web = np.array(scored["domain"].to_pylist()) == "web"
    z = scored["z_ref"].to_numpy() + 10 * web
    scored = scored.set_column(scored.schema.get_field_index("z_ref"), "z_ref", pa.array(z.astype(np.float32)))
    shares = []
    for standardise in ("pool", "domain"):
        plan = select([scored], docs=600, standardise=standardise, temperature=0.1)
        shares.append(np.mean(np.array(plan.table["domain"].to_pylist()) == "web"))
    assert shares[0] == 1
    assert shares[1] == pytest.approx(web.mean(), abs=0.06)


def test_training_order_has_nothing_to_do_with_keys():
    plan = select([pool(20_000)], docs=5_000)
    keys = plan.table["key"].to_numpy()
    assert abs(np.corrcoef(np.arange(5_000), np.argsort(np.argsort(keys)))[0, 1]) < 0.05
    assert plan.table["order"].to_pylist() == list(range(5_000))
    more = {id: place for place, id in enumerate(chosen(select([pool(20_000)], docs=6_000)))}
    places = [more[id] for id in chosen(plan)]
    assert places == sorted(places)  # a document's place in line is its own


# Noise


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


# Budgets


@pytest.mark.parametrize("tokens", [1, 777, 60_000, 500_000, 10**9])
def test_a_budget_of_tokens_is_the_longest_beginning(tokens):
    scored = pool(6_000)
    _, order = keys_by_definition(scored, streams.stream(0, 0, "gumbel"))
    lengths = scored["n_tokens"].to_numpy()[order]
    expected = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), tokens, side="right"))
    plan = select([scored], tokens=tokens)
    assert {*chosen(plan)} == {scored["doc_id"][int(row)].as_py() for row in order[:expected]}
    assert plan.tokens <= tokens
    assert expected == len(order) or tokens < plan.tokens + lengths[expected]
    assert plan.report["unused"] == tokens - plan.tokens


def test_long_documents_that_score_low_do_not_mislead_a_budget():
    """The mean length of the pool is 100 times that of what is chosen, so the first guess holds too few."""
    n = 4_000
    tokens = np.where(np.arange(n) < n // 2, 10, 2000)
    scored = table(ids_of(range(n)), np.where(np.arange(n) < n // 2, 50.0, -50.0), tokens)
    plan = select([scored], tokens=15_000, temperature=0.01)
    assert plan.tokens == 15_000
    assert len(plan) == 1_500


def test_exact_quotas_are_independent_draws():
    scored = pool(8_000)
    names = np.array(scored["domain"].to_pylist())
    plan = select([scored], docs=1_001, quotas={"web": 0.5, "code": 0.3, "wiki": 0.2})
    _, order = keys_by_definition(scored, streams.stream(0, 0, "gumbel"))
    for name, count in (("web", 501), ("code", 300), ("wiki", 200)):  # 500.5, 300.3, 200.2
        best = [row for row in order if names[row] == name][:count]
        mine = [id for id, domain in zip(chosen(plan), plan.table["domain"].to_pylist(), strict=True) if domain == name]
        assert {*mine} == {scored["doc_id"][int(row)].as_py() for row in best}
    assert plan.report["domains"]["web"]["lacking"] == 0


@pytest.mark.parametrize("unit", ["docs", "tokens"])
@pytest.mark.parametrize("quotas", [{"wiki": (0.3, 0.5), "web": (0.0, 0.1)}, {"code": (0.5, 1.0)}, {"web": (0.0, 0.0)}])
@pytest.mark.parametrize("one_per", [None, "near"])
def test_bounds_of_domains_by_definition(unit, quotas, one_per):
    """Clusters go across domains: one whose largest key is in a domain that has its most is lost to the others."""
    scored = pool(6_000, near=pa.array(np.random.default_rng(5).integers(0, 2_000, 6_000)))
    budget = 700 if unit == "docs" else 90_000
    plan = select([scored], quotas=quotas, one_per=one_per, **{unit: budget})
    names, lengths = np.array(scored["domain"].to_pylist()), scored["n_tokens"].to_numpy()
    weights = np.ones(len(names), int) if unit == "docs" else lengths.astype(int)
    _, order = keys_by_definition(scored, streams.stream(0, 0, "gumbel"))
    if one_per:
        near = scored["near"].to_numpy()[order]
        order = order[np.sort(np.unique(near, return_index=True)[1])]
    used, closed, taken = dict.fromkeys(("web", "code", "wiki"), 0), set(), set()
    bounds = {name: quotas.get(name, (0, 1)) for name in used}
    for row in order:  # each least share first
        name = names[row]
        if name in closed or used[name] + weights[row] > round(bounds[name][0] * budget):
            closed.add(name)
            continue
        used[name] += weights[row]
        taken.add(row)
    closed, total = set(), sum(used.values())
    for row in order:
        name = names[row]
        if row in taken or name in closed:
            continue
        if used[name] + weights[row] > round(bounds[name][1] * budget):
            closed.add(name)
            continue
        if total + weights[row] > budget:
            break
        used[name] += weights[row]
        total += weights[row]
        taken.add(row)
    assert {*chosen(plan)} == {scored["doc_id"][int(row)].as_py() for row in taken}


def test_what_a_domain_lacks_is_reported_and_not_made_up():
    scored = pool(1_000)
    wiki = scored["domain"].to_pylist().count("wiki")
    plan = select([scored], docs=600, quotas={"wiki": 0.5, "web": 0.5})
    assert plan.report["domains"]["wiki"]["documents"] == wiki
    assert plan.report["domains"]["wiki"]["lacking"] == 300 - wiki
    assert len(plan) == 300 + wiki
    assert plan.report["unused"] == 300 - wiki


def test_one_document_of_each_cluster_the_one_of_the_largest_key():
    n = 4_000
    clusters = np.random.default_rng(2).integers(0, 600, n)
    scored = pool(n, near=pa.array([None if i % 10 == 0 else f"c{c}" for i, c in enumerate(clusters)]))
    _, order = keys_by_definition(scored, streams.stream(0, 0, "gumbel"))
    held, seen = [], set()
    for row in order:
        name = scored["near"][int(row)].as_py()
        if name is None or name not in seen:
            held.append(scored["doc_id"][int(row)].as_py())
            seen.add(name)
    assert {*chosen(select([scored], docs=900, one_per="near"))} == {*held[:900]}
    assert {*chosen(select([scored], docs=n, one_per="near"))} == {*held}  # more than there are


def test_several_references_are_combined():
    rng = np.random.default_rng(0)
    ids, (a, b) = ids_of(range(500)), rng.standard_normal((2, 500)).astype(np.float32)
    both = table(ids, {"a": a, "b": b})
    alone = {"sum": a.astype(float) + b, "min": np.minimum(a, b), "b": b}
    for combine, score in alone.items():
        plans = select([both], docs=50, combine=combine, temperature=0), np.array(ids)[np.argsort(-score)[:50]]
        assert {*chosen(plans[0])} == {*plans[1].tolist()}
    weighted = select([both], docs=50, combine={"a": 2.0, "b": -1.0}, temperature=0)
    assert {*chosen(weighted)} == {*np.array(ids)[np.argsort(-(2.0 * a - b.astype(float)))[:50]].tolist()}
    with pytest.raises(ValueError, match=r"combine: expected .*'a', 'b'.*got 'c'"):
        select([both], docs=1, combine="c")


# Documents that come twice, and what is refused


def test_a_document_that_comes_twice_is_one():
    scored = pool(2_000)
    again = scored.slice(0, 700)
    plan = select([scored, again], docs=500)
    assert len({*chosen(plan)}) == 500
    first = {*scored["doc_id"].to_pylist()[:700]}
    assert plan.report["repeats"] == sum(id in first for id in chosen(plan)) > 0


def test_a_document_of_two_domains_belongs_to_the_first_by_name():
    ids = ids_of(range(300))
    z = np.linspace(2, -2, 300)
    web, code = table(ids, z, domains=["web"] * 300), table(ids[:100], z[:100], domains=["code"] * 100)
    for shards in ([web, code], [code, web]):
        plan = select(shards, docs=200, quotas={"web": 0.5, "code": 0.5}, standardise="none")
        assert len({*chosen(plan)}) == len(plan) == 200
        names = plan.table["domain"].to_pylist()
        assert {id for id, name in zip(chosen(plan), names, strict=True) if name == "code"} == {*ids[:100]}
    with pytest.raises(ValueError, match="one domain for each document, got code and web for"):
        select([web, code], docs=200, standardise="domain")


def test_documents_of_other_domains_do_not_hide_what_a_domain_still_has():
    """b's two best belong to a, and its third is found in c's list: b's own list has to grow until it holds it."""
    one, two, three, *others = ids_of(range(6))
    shards = [
        table([one, two, others[0]], [3.0, 2.9, 0.0], domains=["a"] * 3),
        table([one, two, three], [3.0, 2.9, 1.0], domains=["b"] * 3),
        table([three, others[1]], [1.0, -1.0], domains=["c"] * 2),
    ]
    plan = select(shards, docs=4, quotas={"a": 0.25, "b": 0.5, "c": 0.25}, temperature=0)
    found = dict(zip(chosen(plan), plan.table["domain"].to_pylist(), strict=True))
    assert found == {one: "a", three: "b", others[1]: "c"}


@pytest.mark.parametrize("same", ["score", "n_tokens", "cluster"])
def test_unequal_rows_of_a_chosen_document_are_refused(same):
    scored = pool(300, near=pa.array(range(300)))
    column = {"score": "z_ref", "n_tokens": "n_tokens", "cluster": "near"}[same]
    other = pool(300, near=pa.array(range(300)))
    index = other.schema.get_field_index(column)
    values = other[column].to_numpy().copy()
    values[17] += 1
    other = other.set_column(index, column, pa.array(values))
    name = scored["doc_id"][17].as_py().hex()
    with pytest.raises(ValueError, match=f"one {same}.* for each document, got .* for {name}"):
        select([scored, other], docs=300, one_per="near")
    if same == "score":  # one of the two alone is among the best
        z = scored["z_ref"].to_numpy().copy()
        z[17] = 1e4
        top = scored.set_column(scored.schema.get_field_index("z_ref"), "z_ref", pa.array(z))
        with pytest.raises(ValueError, match=f"one score .* for {name}"):
            select([top, other], docs=5)


@pytest.mark.parametrize("scores", [(1.0, 1.0), (1.0, 2.0)])
def test_ids_of_equal_first_halves_are_refused(scores):
    ids = ids_of(range(100))
    twin = ids[3][:8] + bytes(8)
    scored = table([*ids, twin], [0.0] * 3 + [scores[0]] + [0.0] * 96 + [scores[1]])
    with pytest.raises(ValueError, match="first 8 bytes, got") as found:
        select([scored], docs=101)
    assert twin.hex() in str(found.value)
    assert ids[3].hex() in str(found.value)


def test_documents_without_tokens_are_no_candidates():
    scored = pool(100)
    tokens = scored["n_tokens"].to_numpy().copy()
    tokens[::2] = 0
    scored = scored.set_column(1, "n_tokens", pa.array(tokens))
    assert {*chosen(select([scored], docs=100))} == {*scored["doc_id"].to_pylist()[1::2]}


def test_unknown_lengths_do_where_no_tokens_are_counted():
    scored = pool(100).set_column(1, "n_tokens", pa.nulls(100, pa.int32()))
    plan = select([scored], docs=10)
    assert plan.table["n_tokens"].null_count == len(plan) == 10
    with pytest.raises(ValueError, match="n_tokens: expected numbers, got 100 nulls"):
        select([scored], tokens=10)


def test_equal_scores_are_a_uniform_draw():
    plan = select([table(ids_of(range(1000)), np.full(1000, 0.3))], docs=100)
    assert plan.report["mean_z"] == 0
    assert len(plan) == 100


def test_edges():
    assert len(select([], docs=5)) == 0
    assert len(select([pool(10)], docs=0)) == 0
    assert len(select([pool(10).slice(0, 0), pool(10)], ratio=1.0)) == 10
    assert len(select([pool(15)], ratio=0.2)) == 3
    assert len(select([pool(10)], tokens=10**15, one_per=None, quotas={"web": 1.0})) < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "tokens, docs, ratio: expected exactly one of them, got none"),
        ({"docs": 1, "ratio": 0.1}, "tokens, docs, ratio: expected exactly one"),
        ({"docs": -1}, "docs: expected at least 0, got -1"),
        ({"ratio": 1.5}, "ratio: expected at least 0 and at most 1, got 1.5"),
        ({"docs": 1, "temperature": -1}, "temperature: expected 0, or from"),
        ({"docs": 1, "temperature": float("nan")}, "temperature: expected 0, or from"),
        ({"docs": 1, "stage": -1}, "stage: expected at least 0, got -1"),
        ({"docs": 1, "standardise": "bin"}, "standardise: expected one of"),
        ({"docs": 1, "noise": "normal"}, "noise: expected one of"),
        ({"docs": 1, "quotas": {"news": 0.5}}, r"quotas: expected domains of the pool, .*got 'news'"),
        ({"docs": 1, "quotas": {"web": (0.5, 0.2)}}, "quotas: expected 0 <= least <= most <= 1"),
        ({"docs": 1, "quotas": {"web": 0.7, "code": 0.7}}, "quotas: expected least shares that add up to at most 1"),
        ({"docs": 1, "one_per": "near"}, "expected the column 'near'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        select([pool(50)], **options)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_scores_are_finite(wrong):
    scored = pool(50)
    z = scored["z_ref"].to_numpy().copy()
    z[31] = wrong
    scored = scored.set_column(scored.schema.get_field_index("z_ref"), "z_ref", pa.array(z))
    with pytest.raises(ValueError, match=f"z_ref: expected finite scores, got {wrong} at row 31 of shard 1"):
        select([pool(50, seed=1), scored], docs=1)


def test_shards_are_checked(tmp_path):
    pq.write_table(pool(5), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="expected every file once"):
        select([tmp_path / "x.parquet", str(tmp_path / "x.parquet")], docs=1)
    with pytest.raises(TypeError, match="expected paths or tables of pyarrow, got int at 0"):
        select([3], docs=1)
    with pytest.raises(ValueError, match=r"expected \['z_ref'\], got \['z_other'\] in shard 1"):
        select([pool(5), pool(5).rename_columns(["doc_id", "n_tokens", "domain", "z_other"])], docs=1)
    with pytest.raises(ValueError, match="domain: expected strings, got int64"):
        select([pool(5).set_column(2, "domain", pa.array(range(5)))], docs=1)
    with pytest.raises(ValueError, match=r"doc_id: expected fixed_size_binary\(16\), got string"):
        select([pool(5).set_column(0, "doc_id", pa.array(list("abcde")))], docs=1)


# Exact sums


def test_sums_do_not_depend_on_order_and_are_right():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.standard_normal(50_000), [4e6, -4e6, 2.0**22 - 1, -0.0]])
    whole, groups = ExactSums(), [ExactSums() for _ in range(5)]
    whole.add(scores)
    order = rng.permutation(len(scores))
    add_by_group(groups, scores[order], rng.integers(0, 5, len(scores)).astype(np.int32))
    merged = ExactSums()
    for part in groups[::-1]:
        merged.merge(part)
    q = [int(x) for x in np.rint(scores * 2**20)]
    assert (whole.n, whole.total, whole.squares) == (len(q), sum(q), sum(x * x for x in q))
    assert merged == whole
    assert merged.mean == pytest.approx(scores.mean(), abs=2**-21)
    assert merged.std == pytest.approx(scores.std(), rel=1e-6)
    for wrong in (2.0**22, np.nan):
        with pytest.raises(ValueError, match="scores: expected finite numbers below 4194304"):
            whole.add(np.array([0.0, wrong]))


# The plan as a file


def test_plans_are_files_and_can_be_cut(tmp_path):
    plan = select([pool(500)], docs=40)
    plan.write(tmp_path / "plan.parquet")
    again = Plan.read(tmp_path / "plan.parquet")
    assert again.table.equals(plan.table)
    assert again.report == plan.report
    part = plan.kept(np.array([7, 3, 30]))
    assert chosen(part) == [chosen(plan)[row] for row in (3, 7, 30)]
    assert part.table["order"].to_pylist() == [0, 1, 2]
    with pytest.raises(ValueError, match="rows: expected distinct positions from 0 to 39"):
        plan.kept(np.array([1, 1]))
    pq.write_table(pool(5), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="expected a plan of MATES"):
        Plan.read(tmp_path / "other.parquet")
