"""What makes a random projection one: the hash to the bit, estimates without bias, variances within their bounds."""

import numpy as np
import pytest

import ghostgram as gg
from ghostgram.reference.grad_project import matrix, philox

SEEDS = 1500


def layer(seed=0, samples=3, tokens=4, d=10, p=12, whole=False):
    rng = np.random.default_rng(seed)
    draw = (lambda shape: rng.integers(-3, 4, shape)) if whole else rng.standard_normal
    return [draw((samples, tokens, n)).astype(np.float32) for n in (d, p)]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of Random123 (kat_vectors, philox4x32 with 10 rounds)
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    assert tuple(philox(counter, key)) == words


PROJECTIONS = {
    "sketch": lambda a, b, **options: gg.grad_sketch(a, b, 500, **options),
    "sketch of 4 nonzeros": lambda a, b, **options: gg.grad_sketch(a, b, 501, nonzeros=4, **options),
    "signs": lambda a, b, **options: gg.grad_project(a, b, 256, 16, **options),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_kernel_and_reference_draw_the_same_bits(projection, dtype):
    """Integers have no rounding errors, and these scales are powers of two: one wrong sign or bucket shows."""
    a, b = (x.astype(dtype) for x in layer(samples=2, tokens=2, d=50, p=35, whole=True))
    for seed in (0, 2**32 + 5, 2**63 - 1):
        for number in (0, 2**32 - 1):
            options = {"seed": seed, "layer": number}
            found = PROJECTIONS[projection](a, b, **options)
            assert np.array_equal(found, PROJECTIONS[projection](a, b, backend="reference", **options))
            assert not np.array_equal(found, PROJECTIONS[projection](a, b, seed=seed, layer=number ^ 1))


def kronecker_variance(norms2, gram):
    return 2 * (1 / 5 + 1 / 4 + 2 / 20) * np.outer(norms2, norms2)


def sparse_variance(norms2, gram):
    return (np.outer(norms2, norms2) + gram**2) / 24


KINDS = {  # a projection, and an upper bound of the variance of the inner products it estimates
    "rademacher": (lambda a, b, seed: gg.grad_project(a, b, 5, 4, seed=seed), kronecker_variance),
    "gaussian": (
        lambda a, b, seed: gg.grad_project(a, b, 5, 4, distribution="gaussian", seed=seed),
        kronecker_variance,
    ),
    "sparse": (lambda a, b, seed: gg.grad_sketch(a, b, 24, seed=seed), sparse_variance),
    "sparse of 3 nonzeros": (lambda a, b, seed: gg.grad_sketch(a, b, 24, nonzeros=3, seed=seed), sparse_variance),
}


def estimates(project, a, b):
    """(SEEDS, B, B) inner products of projected gradients."""
    flat = np.stack([project(a, b, seed).reshape(len(a), -1) for seed in range(SEEDS)]).astype(np.float64)
    return flat @ flat.swapaxes(1, 2)


def deviations(found, truth):
    """How many of its own standard deviations the mean of the estimates is from the truth."""
    return np.abs(found.mean(axis=0) - truth) / (found.std(axis=0) / np.sqrt(len(found)))


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_estimated_without_bias_and_within_the_variance(kind):
    project, variance = KINDS[kind]
    a, b = layer()
    gram = gg.grad_gram(a.astype(np.float64), b.astype(np.float64))
    found = estimates(project, a, b)
    assert deviations(found, gram).max() < 4
    assert (found.var(axis=0) < 1.2 * variance(np.diag(gram), gram)).all()  # so many seeds tell it to a tenth


def test_sketches_of_layers_add_up_to_one_of_the_model():
    (a, b), (a2, b2) = layer(seed=1), layer(seed=2)
    gram = gg.grad_gram(a, b) + gg.grad_gram(a2, b2)

    def of_both(second_layer):
        return lambda _, __, seed: (
            gg.grad_sketch(a, b, 24, seed=seed) + gg.grad_sketch(a2, b2, 24, seed=seed, layer=second_layer)
        )

    assert deviations(estimates(of_both(1), a, b), gram).max() < 4
    assert deviations(estimates(of_both(0), a, b), gram).max() > 8  # one hash for two layers is biased


def test_normals_have_the_moments_of_the_normal_distribution():
    x = matrix("gaussian", 400, 500, 0, 7, 0) * np.sqrt(400)
    for power, moment, square in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105)):
        assert abs(np.mean(x**power) - moment) < 4.5 * np.sqrt((square - moment**2) / x.size)
    for other in (x[1:], x[2:], x[3:]):  # the two of a pair, and those of one draw
        assert abs(np.mean(x[: len(other)] * other)) < 4.5 / np.sqrt(other.size)
