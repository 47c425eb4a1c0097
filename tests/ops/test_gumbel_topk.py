"""gumbel_topk draws from the distribution it names, gives the same bits however it is fed, and refuses what it must."""

import hashlib
import math
import os
import pickle
import subprocess
import sys
from itertools import permutations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import ghostgram as gg
from ghostgram import _C
from ghostgram.ops.gumbel_topk import UnequalScores
from ghostgram.reference import gumbel_topk as reference
from ghostgram.testing.cases.gumbel_topk import KNOWN_BITS

FRAMEWORKS = {"torch": torch.from_numpy, "numpy": np.asarray, "jax": jnp.asarray}


def pool(n, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(n).astype(dtype), rng.permutation(2 * n)[:n]


def fed(scores, ids, k, parts=1, **options):
    """A GumbelTopK that has seen the documents in some parts."""
    top = gg.GumbelTopK(k, **options)
    for part in np.array_split(np.arange(len(scores)), parts):
        top.update(scores[part], ids[part])
    return top


def assert_same_bits(x, y):
    for a, b in zip(x, y, strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


# Distribution.


def kolmogorov(sample, cdf):
    """sqrt(n) times the largest distance between the sample's distribution and cdf: beyond 1.95 once in a thousand."""
    values, n = cdf(np.sort(sample)), len(sample)
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * max(np.max(steps[1:] - values), np.max(values - steps[:-1]))


def noise(n, seed=0):
    """The noise of ids 0 to n - 1, in their order."""
    ids, keys = fed(np.zeros(n), np.arange(n), n, seed=seed).result()
    return keys[np.argsort(ids)]


def gumbel_cdf(x):
    return np.exp(-np.exp(-x))


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_noise_is_gumbel(seed):
    assert kolmogorov(noise(100_000, seed), gumbel_cdf) < 1.95
    assert kolmogorov(-noise(100_000, seed), gumbel_cdf) > 10  # the test sees a wrong sign


def test_noise_of_seeds_and_neighbours_is_independent():
    n = 100_000
    uniform = [gumbel_cdf(noise(n, seed)) - 0.5 for seed in (0, 1, 2**32)]
    for x, y in [(uniform[0], uniform[1]), (uniform[0], uniform[2]), (uniform[0][1:], uniform[0][:-1])]:
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / math.sqrt(n)
    assert np.corrcoef(uniform[0], gumbel_cdf(noise(n, 0)))[0, 1] > 0.99


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return np.sum((counts - expected) ** 2 / expected)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ordered_draws_follow_plackett_luce(temperature):
    scores = np.array([1.0, -0.5, 0.0, 0.7])
    weights = np.exp(scores / temperature)
    pairs = list(permutations(range(4), 2))
    exact = np.array([weights[i] / weights.sum() * weights[j] / (weights.sum() - weights[i]) for i, j in pairs])
    assert math.isclose(exact.sum(), 1)
    counts = np.zeros(len(pairs))
    for seed in range(20_000):
        counts[pairs.index(tuple(gg.gumbel_topk(scores, 2, seed=seed, temperature=temperature).tolist()))] += 1
    assert chi_square(counts, exact) < 31.3  # 11 degrees of freedom, once in a thousand
    assert chi_square(counts, np.full(12, 1 / 12)) > 1000  # the test sees a wrong distribution


def test_noise_is_exact_to_its_bound():
    n = 200_000
    u = reference.uniform(np.arange(n, dtype=np.uint64), 5).astype(np.longdouble)
    exact = -np.log(-np.log(u))
    error = np.abs(noise(n, 5) - exact) / (1 + np.abs(exact))
    assert float(error.max()) <= 2.0**-52
    assert float(error.max()) > 2.0**-56  # longdouble is no wider than double here, and this test is void


# The same bits.

PRINT_BITS = """
import hashlib, numpy as np, ghostgram as gg
from ghostgram import _C
rng = np.random.default_rng(0)
scores, ids = rng.standard_normal(100_003), rng.integers(-2**63, 2**63, 100_003)
digest = hashlib.sha256()
for dtype, k, temperature in ((np.float64, 100_003, 0.7), (np.float32, 5_000, 3.0), (np.float16, 777, 1.0)):
    top = gg.GumbelTopK(k, seed=9, temperature=temperature)
    top.update(scores.astype(dtype), ids)
    for x in top.result():
        digest.update(x.tobytes())
print(_C.isa(), digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    found = {}
    for isa in _C.isas:
        environment = os.environ | {"GHOSTGRAM_ISA": isa}
        printed = subprocess.run([sys.executable, "-c", PRINT_BITS], env=environment, capture_output=True, check=True)
        used, digest = printed.stdout.decode().split()
        found[used] = digest
    if len(found) == 1:
        pytest.skip(f"only {_C.isa()} runs here")
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize(("n", "k"), [(50_000, 1), (50_000, 3_001), (300_000, 60_000), (1_100_000, 9_001)])
def test_order_shards_and_threads_do_not_matter(n, k, temperature):
    scores, ids = pool(n)
    scores = np.round(scores, 2)  # ties at temperature 0
    options = {"seed": 3, "temperature": temperature}
    expected = fed(scores, ids, k, **options).result()
    assert np.all(np.diff(expected[1]) <= 0)
    before = _C.num_threads()
    for threads in (1, 2, 5):
        _C.set_num_threads(threads)
        assert_same_bits(fed(scores, ids, k, **options).result(), expected)
    _C.set_num_threads(before)

    shuffled = np.random.default_rng(1).permutation(n)
    assert_same_bits(fed(scores[shuffled], ids[shuffled], k, parts=7, **options).result(), expected)
    for order in (np.argsort(scores, kind="stable"), np.argsort(-scores, kind="stable")):
        assert_same_bits(fed(scores[order], ids[order], k, parts=3, **options).result(), expected)

    shards = [fed(scores[i::3], ids[i::3], k, **options) for i in range(3)]
    for other in shards[1:]:
        shards[0].merge(pickle.loads(pickle.dumps(other)))
    assert_same_bits(shards[0].result(), expected)

    for order in (np.arange(n), shuffled):
        indices = gg.gumbel_topk(scores[order], k, ids=ids[order], **options)
        assert_same_bits([ids[order][indices]], expected[:1])


@pytest.mark.parametrize("by_id", [False, True])
def test_a_sample_that_misleads_costs_no_document(by_id):
    """Every eighth block of 512, which is what 2^20 documents are sampled by, has all the high scores."""
    n, k = 2**20, 150_000
    scores = np.where(np.arange(n) // 512 % 8 == 0, 30.0, 0.0).astype(np.float32)
    ids = np.random.default_rng(0).permutation(n)
    order = np.argsort(ids)
    expected = fed(scores[order], ids[order], k).result()
    assert 120_000 < np.sum(scores[order][expected[0]] == 30) < 140_000
    if by_id:
        assert_same_bits(fed(scores, ids, k).result(), expected)
    else:
        assert_same_bits([ids[gg.gumbel_topk(scores, k, ids=ids)]], expected[:1])


def test_documents_seen_twice_count_once():
    scores, ids = pool(40_000)
    expected = fed(scores, ids, 900).result()
    twice = fed(scores, ids, 900, parts=2)
    twice.merge(fed(scores[5_000:30_000], ids[5_000:30_000], 900))
    twice.update(scores, ids)
    twice.merge(twice)
    assert_same_bits(twice.result(), expected)
    doubled = np.concatenate([np.arange(40_000), np.arange(20_000)])
    assert_same_bits([gg.gumbel_topk(scores[doubled], 900, ids=ids[doubled])], [gg.gumbel_topk(scores, 900, ids=ids)])


def test_what_is_kept_follows_the_scores():
    """From framework to framework; results are of the first one's type."""
    scores, ids = pool(9_000)
    expected = fed(scores, ids, 400).result()
    for kinds in permutations(FRAMEWORKS):
        top = gg.GumbelTopK(400)
        for kind, part in zip(kinds, np.array_split(np.arange(9_000), 3), strict=True):
            top.update(FRAMEWORKS[kind](scores[part]), FRAMEWORKS[kind](ids[part].astype(np.int32)))
            found, keys = top.result()
            assert type(found) is type(keys) is type(FRAMEWORKS[kinds[0]](scores))
        assert np.array_equal(np.asarray(found), expected[0])
        assert np.array_equal(np.asarray(keys), expected[1].astype(np.asarray(keys).dtype))
        other = gg.GumbelTopK(400)
        other.merge(top)
        assert np.array_equal(np.asarray(other.result()[0]), expected[0])


def test_pickled_state_resumes_and_is_small():
    scores, ids = pool(300_000)
    top = fed(scores[:200_000], ids[:200_000], 1_000)
    state = pickle.dumps(top)
    assert len(state) < 17_000
    resumed = pickle.loads(state)
    for each in (top, resumed):
        each.update(scores[200_000:], ids[200_000:])
    assert_same_bits(resumed.result(), fed(scores, ids, 1_000).result())
    assert_same_bits(resumed.result(), top.result())


# Types.


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_framework_gets_its_own_type(framework):
    make = FRAMEWORKS[framework]
    scores, ids = pool(3_000)
    expected = gg.gumbel_topk(scores, 50, ids=ids)
    got = gg.gumbel_topk(make(scores), 50, ids=make(ids.astype(np.int32)))
    assert type(got) is type(make(scores))
    assert np.array_equal(np.asarray(got), expected)
    assert str(got.dtype).endswith("int32" if framework == "jax" else "int64")

    top = gg.GumbelTopK(50)
    top.update(make(scores), make(ids.astype(np.int32)))
    found, keys = pickle.loads(pickle.dumps(top)).result()
    assert type(found) is type(keys) is type(make(scores))
    assert str(found.dtype).endswith("int32")
    assert np.array_equal(np.asarray(found), ids[expected])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_every_dtype_of_scores(dtype):
    scores = torch.from_numpy(pool(5_000)[0]).to(getattr(torch, dtype))
    expected = gg.gumbel_topk(scores.double(), 100)
    assert torch.equal(gg.gumbel_topk(scores, 100), expected)
    assert torch.equal(gg.gumbel_topk(scores, 100, backend="reference"), expected)
    strided, ids = torch.stack([scores, scores], 1)[:, 1], torch.arange(10_000)[::2] // 2
    assert torch.equal(gg.gumbel_topk(strided, 100), expected)
    top = gg.GumbelTopK(100)
    top.update(strided, ids)
    assert torch.equal(top.result()[0], expected)


def test_signed_and_unsigned_ids_of_equal_bits_are_equal():
    scores, _ = pool(5_000)
    unsigned = np.random.default_rng(2).integers(0, 2**64, 5_000, dtype=np.uint64)
    signed = unsigned.view(np.int64)
    expected = gg.gumbel_topk(scores, 100, ids=signed)
    assert np.array_equal(gg.gumbel_topk(scores, 100, ids=unsigned), expected)
    assert torch.equal(
        gg.gumbel_topk(torch.from_numpy(scores), 100, ids=torch.from_numpy(unsigned)), torch.from_numpy(expected)
    )
    ids, _ = fed(scores, unsigned, 100).result()
    assert ids.dtype == np.uint64
    assert np.array_equal(ids, unsigned[expected])
    ties = gg.gumbel_topk(np.zeros(2), 2, ids=np.array([-1, 1]), temperature=0.0)
    assert ties.tolist() == [1, 0]  # -1 is the largest unsigned id


def test_compiles_in_one_graph():
    scores, ids = map(torch.from_numpy, pool(2_000))

    def door(scores, ids):
        return gg.gumbel_topk(scores, 100, ids=ids, seed=2**64 - 1), gg.gumbel_topk(scores, 5_000, temperature=0.5)

    compiled = torch.compile(door, fullgraph=True, backend="aot_eager")
    for got, eager in zip(compiled(scores, ids), door(scores, ids), strict=True):
        assert torch.equal(got, eager)


# Edges.


def test_edges_of_k():
    scores, ids = pool(100)
    assert gg.gumbel_topk(scores, 0).shape == (0,)
    assert sorted(gg.gumbel_topk(scores, 1_000)) == list(range(100))
    assert gg.gumbel_topk(scores[:0], 5).shape == (0,)
    found, keys = gg.GumbelTopK(5).result()
    assert found.shape == keys.shape == (0,)
    found, keys = fed(scores, ids, 0).result()
    assert found.shape == keys.shape == (0,)
    huge = fed(scores, ids, 10**15, parts=4)
    assert sorted(huge.result()[0]) == sorted(ids)
    assert sorted(huge.result()[0]) == sorted(ids)


def test_without_temperature_the_largest_scores_come_first():
    scores = np.array([0.0, 2.0, -0.0, 2.0, -1.0])
    assert gg.gumbel_topk(scores, 5, temperature=0.0).tolist() == [1, 3, 0, 2, 4]
    assert gg.gumbel_topk(scores, 3, ids=np.array([4, 3, 2, 1, 0]), temperature=0.0).tolist() == [3, 1, 2]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_infinities_are_first_and_last(temperature, backend):
    scores = np.array([-np.inf, 0.0, np.inf, 1.0, np.inf, -np.inf] + [0.5] * 1_000, np.float32)
    order = gg.gumbel_topk(scores, 2_000, temperature=temperature, backend=backend).tolist()
    assert order[:2] == [2, 4]
    assert order[-2:] == [0, 5]


def test_signed_zeros_are_equal():
    n = 50_000
    zeros = np.zeros(n)
    assert_same_bits(fed(-zeros, np.arange(n), n).result(), fed(zeros, np.arange(n), n).result())
    assert_same_bits(
        fed(-zeros, np.arange(n), n, temperature=0.0).result(), fed(zeros, np.arange(n), n, temperature=0.0).result()
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("k", [0, 10])
def test_nan_is_named(backend, k):
    scores, _ = pool(100_000)
    scores[[70_001, 90_000]] = np.nan
    with pytest.raises(ValueError, match=r"^scores: expected numbers, got NaN at index 70001"):
        gg.gumbel_topk(scores, k, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_id_with_two_scores_is_named(backend):
    scores, ids = np.zeros(5_000), np.arange(5_000)
    scores[[20, 21]] = 40.0
    ids[[20, 21]] = 7, 7
    assert len(gg.gumbel_topk(scores, 10, ids=ids, backend=backend)) == 10  # equal scores: one document
    scores[21] = 41.0
    with pytest.raises(ValueError, match=r"^ids: expected one score for each id, got two for id 7"):
        gg.gumbel_topk(scores, 10, ids=ids, backend=backend)
    top = gg.GumbelTopK(10, backend=backend)
    top.update(scores[:21], ids[:21])
    top.update(scores[21:], ids[21:])
    with pytest.raises(UnequalScores, match=r"got two for id 7") as error:
        top.result()
    assert error.value.id == 7
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


ONES = np.ones(3)
ERRORS = [
    (lambda: gg.gumbel_topk(ONES, -1), ValueError, r"^k: expected at least 0, got -1"),
    (lambda: gg.gumbel_topk(ONES, 1.5), TypeError, r"integer"),
    (lambda: gg.gumbel_topk(ONES, 1, seed=-1), ValueError, r"^seed: expected 0 to 2\^64 - 1, got -1"),
    (lambda: gg.gumbel_topk(ONES, 1, temperature=-1.0), ValueError, r"^temperature: expected 0, or from"),
    (lambda: gg.gumbel_topk(ONES, 1, temperature=math.nan), ValueError, r"^temperature: expected 0, or from"),
    (lambda: gg.gumbel_topk(ONES, 1, temperature=math.inf), ValueError, r"^temperature: expected 0, or from"),
    (lambda: gg.gumbel_topk(ONES.astype(int), 1), TypeError, r"^scores: expected float32"),
    (lambda: gg.gumbel_topk(ONES[None], 1), ValueError, r"^scores: expected shape \(n,\), got \(1, 3\)"),
    (lambda: gg.gumbel_topk(ONES, 1, ids=np.arange(2)), ValueError, r"^ids: expected shape \(3,\) like scores"),
    (lambda: gg.gumbel_topk(ONES, 1, ids=ONES), TypeError, r"^ids: expected int32, int64 or uint64"),
    (lambda: gg.gumbel_topk(ONES, 1, ids=torch.arange(3)), TypeError, r"^ids: expected a numpy array like scores"),
    (lambda: gg.gumbel_topk(ONES, 3, ids=np.zeros(3, int)), ValueError, r"^ids: expected at least 3 different ones"),
    (lambda: gg.gumbel_topk(ONES, 3, backend="cuda"), RuntimeError, r"backend 'cuda' is not available"),
    (lambda: gg.GumbelTopK(1).update(ONES, None), TypeError, r"^ids: expected an array, got None"),
    (lambda: fed(ONES, np.arange(3), 1).update(ONES, np.arange(3, dtype=np.uint64)), TypeError, r"^ids: expected ids"),
    (lambda: gg.GumbelTopK(1).merge(gg.GumbelTopK(1, seed=2)), ValueError, r"^other: expected \(k, seed, temp"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
def test_errors_name_the_argument(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_the_kernel_checks_what_it_relies_on():
    def call(k=2, room=3, held=0, by_position=True, temperature=1.0):
        state = (np.empty(room), np.empty(room, np.int64), np.array([held]), np.array([-np.inf]), np.empty(4, np.int64))
        _C.cpu.gumbel_topk(np.ones(3), None, *state, k, 0, temperature, by_position, True)

    call()
    for wrong, message in [
        ({"k": -1}, "^k: expected"),
        ({"room": 2}, "^keys: expected room"),
        ({"held": 4}, "^keys: expected room"),
        ({"held": -1}, "^keys: expected room"),
        ({"held": 1, "room": 9}, "^held: expected 0"),
        ({"temperature": 1e301}, "^temperature: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**wrong)


def test_bits_of_a_known_draw():
    ids, keys = fed(np.arange(2_000) / 500, np.arange(2_000), 50, seed=2024).result()
    assert hashlib.sha256(ids.tobytes() + keys.tobytes()).hexdigest()[:16] == KNOWN_BITS
