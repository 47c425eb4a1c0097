"""Relations are recovered from rollouts, and greedy choices are those of exhaustive search, step by step."""

import numpy as np
import pytest

from ghostgram.algorithms.mates.selection.clusters import kmeans, shares
from ghostgram.algorithms.mates.selection.group import Relation, fit_relation, mmr, rerank


def value_by_definition(relation, sequence):
    """The formula of one sequence, written out."""
    values = []
    for t, h in enumerate(sequence):
        likeness = [h @ x / np.linalg.norm(h) / np.linalg.norm(x) for x in sequence[:t]]
        bracket = relation.alpha - relation.alpha / (relation.beta * t) * sum(likeness) if t else relation.alpha
        values.append(bracket * (relation.head @ h))
    return values


@pytest.fixture
def rollouts():
    rng = np.random.default_rng(0)
    h = rng.standard_normal((300, 10, 8)) * rng.uniform(0.5, 2, (300, 10, 1)) + 0.5
    return h, Relation(0.8, 0.8 / 1.7, rng.standard_normal(8))


def test_values_are_the_formula(rollouts):
    h, relation = rollouts
    assert relation.beta == pytest.approx(1.7)
    np.testing.assert_allclose(relation.values(h)[3], value_by_definition(relation, h[3]), rtol=1e-12)
    np.testing.assert_allclose(relation.values(h)[:, 0], 0.8 * h[:, 0] @ relation.head, rtol=1e-12)


def test_a_planted_relation_is_recovered(rollouts):
    h, planted = rollouts
    y = planted.values(h)
    known = fit_relation(h, y, planted.head)
    assert known.alpha == pytest.approx(planted.alpha, rel=1e-9)
    assert known.beta == pytest.approx(planted.beta, rel=1e-9)
    learned = fit_relation(h, y)
    assert learned.alpha == 1
    assert learned.beta == pytest.approx(planted.beta, rel=1e-3)
    np.testing.assert_allclose(learned.head, planted.alpha * planted.head, rtol=1e-3)
    noisy = fit_relation(h, y + np.random.default_rng(1).standard_normal(y.shape) * y.std(), planted.head)
    assert noisy.alpha == pytest.approx(planted.alpha, rel=0.1)
    assert noisy.beta == pytest.approx(planted.beta, rel=0.5)


def test_fits_refuse_what_does_not_fit(rollouts):
    h, relation = rollouts
    y = relation.values(h)
    with pytest.raises(ValueError, match=r"expected \(N, T, d\) and \(N, T\) with T >= 2"):
        fit_relation(h[:, :1], y[:, :1])
    with pytest.raises(ValueError, match="labels: expected finite"):
        fit_relation(h, np.where(y > 3, np.nan, y))
    with pytest.raises(ValueError, match=r"head: expected shape \(8,\)"):
        fit_relation(h, y, relation.head[:4])


@pytest.mark.parametrize("clusters", [None, np.repeat([3, 1, 7], [20, 9, 11])])
def test_greedy_takes_the_best_next_document(rollouts, clusters):
    h, relation = rollouts
    vectors = h.reshape(-1, 8)[:40]
    single, cosines = vectors @ relation.head, vectors @ vectors.T
    cosines /= np.linalg.norm(vectors, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)
    labels = np.zeros(40, int) if clusters is None else clusters
    quotas = [12] if clusters is None else [3, 6, 3]  # of 1, 3 and 7: 2.7, 6.0 and 3.3
    for ours, worth in (
        (
            rerank(relation, vectors, 12, clusters),
            lambda x, before: relation.values(vectors[[*before, x]][None])[0, -1],
        ),
        (
            mmr(single, vectors, 12, 0.3, clusters),
            lambda x, before: 0.3 * single[x] - (0.7 * max(cosines[x, b] for b in before) if before else 0),
        ),
    ):
        expected = []
        for label, quota in zip(np.unique(labels), quotas, strict=True):
            before = []
            for _ in range(quota):
                left = [x for x in np.flatnonzero(labels == label) if x not in before]
                before.append(max(left, key=lambda x, before=before, worth=worth: worth(x, before)))
            expected += before
        assert ours.tolist() == expected


def test_likeness_that_costs_spreads_the_choice():
    """Two near copies of the best document: single scores take all three, the relation takes one of them."""
    vectors = np.array([[3.0, 0, 0], [3, 0.01, 0], [3, 0, 0.01], [0, 2, 0.1], [0, 0.1, 2]])
    head = np.ones(3)
    assert {*rerank(Relation(1.0, 0.0, head), vectors, 3).tolist()} == {0, 1, 2}
    assert {*rerank(Relation(1.0, 0.9, head), vectors, 3).tolist()} == {1, 3, 4}
    assert rerank(Relation(1.0, 0.9, head), vectors, 0).tolist() == []
    with pytest.raises(ValueError, match="k: expected 0 to 5, got 6"):
        rerank(Relation(1.0, 0.9, head), vectors, 6)


def test_mmr_checks_its_arguments():
    with pytest.raises(ValueError, match="trade: expected 0 to 1, got 2"):
        mmr(np.zeros(3), np.ones((3, 2)), 1, 2)
    with pytest.raises(ValueError, match=r"scores: expected shape \(3,\) like vectors"):
        mmr(np.zeros(2), np.ones((3, 2)), 1)
    with pytest.raises(ValueError, match=r"clusters: expected shape \(3,\)"):
        mmr(np.zeros(3), np.ones((3, 2)), 1, clusters=[1, 2])


# Clusters


def test_planted_directions_are_found_whatever_their_length():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((16, 16)))[0][:6]
    truth = rng.integers(0, 6, 600)
    vectors = (directions[truth] + 0.1 * rng.standard_normal((600, 16))) * rng.uniform(0.1, 10, (600, 1))
    found = kmeans(vectors, 6, seed=1)
    pairs = {*zip(truth.tolist(), found.labels.tolist(), strict=True)}
    assert len(pairs) == 6
    np.testing.assert_allclose(np.linalg.norm(found.centres, axis=1), 1, rtol=1e-12)
    again = kmeans(vectors, 6, seed=1)
    assert again.labels.tobytes() == found.labels.tobytes()


def test_clusters_are_never_fewer_than_asked_for_where_documents_differ():
    vectors = np.concatenate([np.tile([1.0, 0.0], (50, 1)), [[0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]])
    for seed in range(5):
        assert len({*kmeans(vectors, 4, seed).labels.tolist()}) == 4
    with pytest.raises(ValueError, match="vectors: expected finite ones of positive length"):
        kmeans(np.zeros((3, 2)), 1)
    with pytest.raises(ValueError, match="clusters: expected 1 to 3, got 4"):
        kmeans(np.ones((3, 2)), 4)


def test_shares_add_up():
    assert shares([50, 30, 20], 10).tolist() == [5, 3, 2]
    assert shares([1, 1, 1], 2).tolist() == [1, 1, 0]
    assert shares([5, 0, 5], 10).tolist() == [5, 0, 5]
    sizes = np.random.default_rng(0).integers(0, 1000, 57)
    for k in (0, 1, 313, int(sizes.sum())):
        given = shares(sizes, k)
        assert given.sum() == k
        assert (np.abs(given - k * sizes / sizes.sum()) < 1).all()
        assert (given <= sizes).all()
