"""softmax_stats where floats give up: confidence beyond 1 - 1e-8, classes that cannot be, infinities; and its face."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ghostgram as gg
from ghostgram import _C

BACKENDS = ("cpu", "reference")
FIELDS = ("loss", "el2n", "entropy", "max_probability")


def stats(logits, labels, dtype=np.float64, **options):
    return gg.softmax_stats(np.asarray(logits, dtype), np.asarray(labels), **options)


def close(got, expected, tolerance):
    """By relative error alone, as small as the numbers may be."""
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 1e-6)])
def test_values_known_in_closed_form(backend, dtype, tolerance):
    for logits, label, expected in [
        ([2, 1, 0], 0, 0.42433612424675893),
        ([0, 0, 0], 1, (2 / 3) ** 0.5),
        ([60, 0, -5], 0, np.exp(-60) * np.sqrt((1 + np.exp(-10)) + (1 + np.exp(-5)) ** 2)),
        ([3, 3], 0, 0.5**0.5),
    ]:
        close(stats([logits], [label], dtype, backend=backend).el2n[0], expected, tolerance)
    tiny = np.exp(-60) * (1 + np.exp(-5))
    sure = stats([[60, 0, -5]], [0], dtype, backend=backend)
    close(sure.loss[0], tiny, tolerance)
    # Sure of the wrong class, the entropy is as small: -sum_{c != first} p_c log p_c and 1 - p_first.
    wrong = stats([[60, 0, -5]], [1], dtype, backend=backend)
    close(wrong.entropy[0], np.exp(-60) * (61 + 66 * np.exp(-5)), tolerance)
    assert wrong.entropy[0] == sure.entropy[0]
    close(wrong.loss[0], 60, tolerance)
    close(wrong.el2n[0], 2**0.5, tolerance)
    even = stats(np.zeros((1, 1000)), [7], dtype, backend=backend)
    close(even.entropy[0], np.log(1000), tolerance)
    close(even.max_probability[0], 1e-3, tolerance)


@pytest.mark.parametrize("classes", [3, 40, 3000])
def test_confident_rows_keep_their_digits_in_float32(classes):
    """The margin grows until the results leave float32's range; none of them loses a digit on the way."""
    rng = np.random.default_rng(classes)
    logits = rng.standard_normal((160, classes)).astype(np.float32)
    first = rng.integers(0, classes, 160)
    logits[np.arange(160), first] += np.arange(160, dtype=np.float32) / 2
    for label in (first, (first + 1) % classes):
        got = gg.softmax_stats(logits, label)
        exact = gg.softmax_stats(logits.astype(np.float64), label, backend="reference")
        for name in FIELDS:
            np.testing.assert_allclose(getattr(got, name), getattr(exact, name), rtol=3e-6, atol=0, err_msg=name)
    naive = torch.log_softmax(torch.from_numpy(logits), 1)
    assert float((1 - naive.exp()[np.arange(160), first]).min()) <= 0  # what 1 - p_y gives there


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_classes_have_equality_in_the_bounds(backend):
    gap = np.linspace(-700, 700, 57)
    found = stats(np.stack([gap, 0 * gap], 1), np.zeros(57, int), backend=backend)
    np.testing.assert_allclose(found.el2n, np.sqrt(2) * np.exp(-np.logaddexp(gap, 0)), rtol=1e-12)
    np.testing.assert_allclose(found.loss, np.logaddexp(-gap, 0), rtol=1e-12)


def test_el2n_lies_within_its_bounds():
    rng = np.random.default_rng(0)
    classes = 10
    logits = rng.standard_normal((10_000, classes)) * rng.exponential(5, (10_000, 1))
    labels = rng.integers(0, classes, 10_000)
    found = stats(logits, labels)
    missing = -np.expm1(-found.loss)
    assert np.all(found.el2n <= np.sqrt(2) * missing * (1 + 1e-12))
    assert np.all(found.el2n >= np.sqrt(classes / (classes - 1)) * missing * (1 - 1e-12))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [1, 2, 5, 1500])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_nan_and_infinity_give_nan_in_their_row_alone(backend, classes, value, place):
    logits = np.random.default_rng(classes).standard_normal((3, classes)).astype(np.float32)
    logits[1, place] = value
    for labels in (np.zeros(3, int), np.full((3, classes), 1 / classes, np.float32)):
        for found in stats(logits, labels, np.float32, backend=backend):
            assert np.isnan(found).tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_beside_masked_classes_is_not_passed_over(backend):
    inf = np.inf
    for row in ([np.nan, -inf, 3], [np.nan, 3, -inf], [-inf, -inf, np.nan], [-inf, -inf, -inf], [np.nan] * 3):
        for found in stats([row], [1], backend=backend):
            assert np.isnan(found).all(), row


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_classes(backend):
    inf = np.inf
    found = stats([[1, -inf, 0], [1, -inf, 0], [-inf, -inf, 5]], [0, 1, 2], backend=backend)
    plain = stats([[1, 0], [1, 0], [5, 5]], [0, 0, 0], backend=backend)
    np.testing.assert_allclose(found.entropy[:2], plain.entropy[:2], rtol=1e-14)
    assert found.loss.tolist() == pytest.approx([plain.loss[0], inf, 0])
    assert found.el2n[1] == pytest.approx(np.sqrt(1 + (np.e**2 + 1) / (np.e + 1) ** 2))  # all of p is elsewhere
    assert [x[2] for x in found] == [0, 0, 0, 1]
    soft = stats([[1, -inf, 0], [1, -inf, 0]], [[0.5, 0, 0.5], [0.5, 0.1, 0.4]], backend=backend)
    assert np.isfinite(soft.loss[0])  # a class of probability 0 in both adds nothing
    assert soft.loss[1] == inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_to_ignore_give_zeros_and_may_hold_anything(backend):
    logits = np.full((3, 5), np.nan, np.float32)
    logits[1] = [0, 1, 2, 3, 4]
    for ignored, labels in ((-100, [-100, 4, -100]), (2, [2, 4, 2]), (77, [77, 4, 77])):
        found = stats(logits, labels, np.float32, ignore_index=ignored, backend=backend)
        assert all(x[0] == x[2] == 0 for x in found)
        expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits[1]), torch.tensor(4))
        assert found.loss[1] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("bad", [5, -1, -101])
def test_the_first_label_out_of_range_is_named(backend, kind, bad):
    labels = np.zeros((40, 50), kind)
    labels[3, 7] = bad
    labels[30, 2] = 9999
    with pytest.raises(IndexError, match=rf"^labels: expected 0 <= label < 5 .*, got {bad} at row 157$"):
        stats(np.zeros((40, 50, 5)), labels, backend=backend)


def test_shapes_and_views():
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.standard_normal((3, 6, 11))).float()
    labels = torch.from_numpy(rng.integers(0, 11, (3, 6)))
    shifted = gg.softmax_stats(logits[:, :-1], labels[:, 1:])
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    torch.testing.assert_close(shifted.loss, expected)
    assert all(x.shape == (3, 5) for x in shifted)
    assert torch.equal(gg.el2n(logits.flatten(0, 1), labels.flatten()), gg.softmax_stats(logits, labels).el2n.flatten())
    assert torch.equal(gg.el2n(logits.view(3, 2, 3, 11), labels.view(3, 2, 3)), gg.el2n(logits, labels).view(3, 2, 3))
    one = gg.softmax_stats(logits[0, 0], labels[0, 0])
    assert one.loss.shape == ()
    assert one.loss == gg.softmax_stats(logits, labels).loss[0, 0]
    columns = logits.mT.contiguous().mT  # the last axis strided: copied
    assert torch.equal(gg.el2n(columns, labels), gg.el2n(logits, labels))


def test_distributions_follow_torch_and_meet_class_numbers():
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.standard_normal((50, 30)))
    soft = torch.softmax(torch.from_numpy(rng.standard_normal((50, 30))), 1)
    found = gg.softmax_stats(logits, soft)
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(logits, soft, reduction="none"))
    torch.testing.assert_close(found.el2n, (torch.softmax(logits, 1) - soft).norm(dim=1))
    labels = torch.from_numpy(rng.integers(0, 30, 50))
    sure = logits + 40 * torch.nn.functional.one_hot(labels, 30)
    onehot = torch.nn.functional.one_hot(labels, 30).double()
    for x, y in zip(gg.softmax_stats(sure, labels), gg.softmax_stats(sure, onehot), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


@pytest.mark.parametrize("labels", ["numbers", "distributions"])
@pytest.mark.parametrize("shape", [(1, 300_001), (3, 140_000), (70, 3000), (5000, 7)])
def test_same_bits_for_any_number_of_threads(shape, labels):
    rng = np.random.default_rng(3)
    logits = rng.standard_normal(shape).astype(np.float32)
    label = rng.integers(0, shape[1], shape[0]) if labels == "numbers" else rng.random(shape, np.float32)
    before, found = _C.num_threads(), []
    for threads in (1, 2, 4):
        _C.set_num_threads(threads)
        found.append(gg.softmax_stats(logits, label))
    _C.set_num_threads(before)
    for other in found[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(found[0], other, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    classes=st.integers(1, 2100),
    spread=st.sampled_from([0.1, 3.0, 40.0]),
    moved=st.sampled_from([0.0, -512.0, 4096.0]),
    seed=st.integers(0, 99),
)
def test_classes_permute_and_logits_shift(classes, spread, moved, seed):
    rng = np.random.default_rng(seed)
    logits = np.round(spread * rng.standard_normal((4, classes)) * 256) / 256  # so that shifts are exact
    labels = rng.integers(0, classes, 4)
    order = rng.permutation(classes)
    found = stats(logits, labels)
    for x, y in zip(found, stats(logits[:, order] + moved, np.argsort(order)[labels]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-300)
