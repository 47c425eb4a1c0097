"""ZCA: what it does to a covariance, that it can be undone, and that a saved one is the same or refused."""

import numpy as np
import pytest
import torch

from ghostgram.algorithms.pad import zca
from ghostgram.algorithms.pad.zca import Zca

EPS = 0.1


def images(n=300, shape=(3, 6, 5), dtype=torch.float64, seed=0):
    """Smooth images in [0, 1]: neighbours are alike, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randn(n, *shape, dtype=torch.float64, generator=generator)
    smooth = rough.cumsum(2).cumsum(3) + rough.mean(1, keepdim=True)
    return (0.5 + 0.15 * smooth).clamp(0, 1).to(dtype)


def covariance(x):
    return torch.cov(x.flatten(1).double().T)


def test_whitened_images_have_the_covariance_of_the_formula():
    x = images()
    fitted = Zca.fit(x, EPS)
    y = fitted.apply(x)
    in_axes = fitted.axes.T @ covariance(y) @ fitted.axes
    expected = (fitted.variances / (fitted.variances + EPS)).diag()
    torch.testing.assert_close(in_axes, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(y.mean(0), torch.zeros_like(y[0]), rtol=0, atol=1e-12)
    assert in_axes.diag().max() > 0.5  # the strongest direction is whitened ...
    assert in_axes.diag().min() < 0.05  # ... and the weakest is not blown up


def test_it_is_numpys_whitening():
    x = images()
    flat = x.flatten(1).numpy()
    s, u = np.linalg.eigh(np.cov(flat.T))
    expected = (flat - flat.mean(0)) @ (u @ np.diag((s + EPS) ** -0.5) @ u.T)
    np.testing.assert_allclose(Zca.fit(x, EPS).apply(x).flatten(1).numpy(), expected, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_inverse_gives_the_images_back(dtype, tolerance):
    x = images(dtype=dtype)
    fitted = Zca.fit(x, EPS)
    y = fitted.apply(x)
    assert y.dtype == dtype
    assert (y - x).abs().max() > 0.1
    torch.testing.assert_close(fitted.inverse(y), x, rtol=0, atol=tolerance)
    torch.testing.assert_close(fitted.apply(fitted.inverse(y)), y, rtol=0, atol=tolerance)


def test_fewer_images_than_pixels_and_flat_ones_are_fine():
    x = images(n=20)
    fitted = Zca.fit(x, EPS)
    torch.testing.assert_close(fitted.inverse(fitted.apply(x)), x, rtol=0, atol=1e-10)
    grey = torch.full((4, 1, 2, 2), 0.25)
    assert torch.equal(Zca.fit(grey, EPS).apply(grey), torch.zeros_like(grey))


def test_images_are_taken_in_parts(monkeypatch):
    x = images()
    fitted, whitened = Zca.fit(x, EPS), Zca.fit(x, EPS).apply(x)
    monkeypatch.setattr(zca, "ROWS", 7)
    other = Zca.fit(x, EPS)
    torch.testing.assert_close(other.variances, fitted.variances, rtol=0, atol=1e-12)
    torch.testing.assert_close(other.apply(x), whitened, rtol=0, atol=1e-10)
    assert fitted.apply(x[:0]).shape == x[:0].shape


def test_only_training_images_decide():
    train, test = images(), images(seed=1)
    fitted = Zca.fit(train, EPS)
    digest = fitted.digest
    fitted.apply(test)
    assert fitted.digest == digest == Zca.fit(train.clone(), EPS).digest
    assert Zca.fit(train[1:], EPS).digest != digest
    assert Zca.fit(train, 0.2).digest != digest


def test_a_saved_whitening_is_the_same_to_the_bit(tmp_path):
    x = images()
    fitted = Zca.fit(x, EPS)
    fitted.save(tmp_path / "zca.npz")
    loaded = Zca.load(tmp_path / "zca.npz")
    assert (loaded.digest, loaded.shape, loaded.eps) == (fitted.digest, (3, 6, 5), EPS)
    assert torch.equal(loaded.apply(x), fitted.apply(x))
    assert torch.equal(loaded.inverse(x), fitted.inverse(x))
    assert [path.name for path in tmp_path.iterdir()] == ["zca.npz"]


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "zca.npz"
    Zca.fit(images(), EPS).save(path)
    whole = path.read_bytes()
    for at in (len(whole) // 5, len(whole) // 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"zca\.npz: expected"):
            Zca.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"zca\.npz: expected a saved Zca"):
        Zca.load(path)
    path.write_bytes(whole)
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    arrays["eps"] = np.array(0.2)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="expected the digest"):
        Zca.load(path)


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match=r"images: expected raw pixels in \[0, 1\], got 0\.0 to 255\.0"):
        Zca.fit(images().round() * 255)
    with pytest.raises(ValueError, match=r"images: expected raw pixels in \[0, 1\], got nan"):
        Zca.fit(images() * float("nan"))
    with pytest.raises(ValueError, match=r"images: expected \(n, C, H, W\) with n >= 2, got shape \(1, 3, 6, 5\)"):
        Zca.fit(images(n=1))
    with pytest.raises(ValueError, match="eps: expected a positive number, got 0"):
        Zca.fit(images(), 0)
    with pytest.raises(TypeError, match="got uint8"):
        Zca.fit(torch.zeros(3, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images: expected \(n, 3, 6, 5\), got \(4, 3, 5, 6\)"):
        Zca.fit(images()).apply(torch.zeros(4, 3, 5, 6))
