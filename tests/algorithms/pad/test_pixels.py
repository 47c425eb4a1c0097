"""Pixels in, images out, and back; and a distilled set's file."""

import numpy as np
import pytest
import torch

from ghostgram.algorithms.pad import DistilledSet
from ghostgram.algorithms.pad.pixels import Standard, as_pixels, whitening
from ghostgram.algorithms.pad.settings import Settings
from ghostgram.algorithms.pad.zca import Zca


def images(n=50, channels=3):
    return torch.rand(n, channels, 4, 4, generator=torch.Generator().manual_seed(0)) ** 2


def test_standard_images_have_mean_0_and_deviation_1(tmp_path):
    pixels = images()
    found = Standard.fit(pixels)
    made = found.apply(pixels)
    assert torch.allclose(made.mean((0, 2, 3)), torch.zeros(3), atol=1e-6)
    assert torch.allclose(made.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-6)
    assert torch.allclose(found.inverse(made), pixels, atol=1e-6)
    found.save(tmp_path / "w.npz")
    assert Standard.load(tmp_path / "w.npz").digest == found.digest
    assert Standard.fit(pixels[1:]).digest != found.digest


def test_a_constant_channel_is_only_shifted():
    pixels = images()
    pixels[:, 1] = 0.25
    found = Standard.fit(pixels)
    assert torch.equal(found.apply(pixels)[:, 1], torch.zeros(50, 4, 4))
    assert torch.equal(found.inverse(found.apply(pixels))[:, 1], pixels[:, 1])


@pytest.mark.parametrize("kind", ["zca", "standard", "none"])
def test_a_whitening_is_fitted_once(kind, tmp_path):
    settings, pixels = Settings(whitening=kind), images()
    found = whitening(settings, pixels, tmp_path / "w.npz")
    again = whitening(settings, pixels.flip(3) * 0.5, tmp_path / "w.npz")  # read, not fitted to these
    assert isinstance(found, Zca if kind == "zca" else Standard)
    assert again.digest == found.digest
    assert torch.allclose(again.inverse(found.apply(pixels)), pixels, atol=1e-5)
    assert torch.equal(found.apply(pixels), pixels) == (kind == "none")


def test_bytes_become_shares():
    given = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(as_pixels(given, "x").flatten(), torch.arange(256) / 255)
    assert as_pixels(images().double(), "x").dtype == torch.float32


def test_files_that_are_no_sets_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(
        ValueError, match=r"other.npz: expected a distilled set, got a file without beta, facts, labels"
    ):
        DistilledSet.load(tmp_path / "other.npz")
    made = DistilledSet(images(4), images(4), torch.tensor([0, 0, 1, 1]), None, 0.1, ["a", "b"], "")
    with pytest.raises(ValueError, match=r"path: expected one that ends with .pt or .npz, got .*set.pkl"):
        made.save(tmp_path / "set.pkl")
    made.save(tmp_path / "set.npz")
    read = DistilledSet.load(tmp_path / "set.npz")
    assert read.label_logits is None
    assert read.targets.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
