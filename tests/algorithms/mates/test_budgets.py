"""No budget is overrun, and quotas and clusters are what their definitions say."""

import numpy as np
import pyarrow as pa
import pytest

from algorithms.mates.scored import chosen, ids_of, keys_by_definition, pool, table
from ghostgram.algorithms.mates.selection import streams
from ghostgram.algorithms.mates.selection.select import select


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
