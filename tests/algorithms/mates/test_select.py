"""The plan is the same however the pool lies, and what no plan can be made from is refused."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from algorithms.mates.scored import chosen, ids_of, pool, table
from ghostgram.algorithms.mates.selection.plan import Plan
from ghostgram.algorithms.mates.selection.select import select


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
