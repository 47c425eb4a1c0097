"""Data sets of pairs become arrays, whatever kind of image they hold, and what is no image set is named."""

import numpy as np
import pytest

from ghostgram.data import image_arrays

rng = np.random.default_rng(0)
PIXELS = rng.integers(0, 256, (5, 3, 4, 6), np.uint8)
LABELS = [3, 0, 1, 1, 2]


class Pairs:
    """A map-style data set, of any kind of image."""

    def __init__(self, images, labels=LABELS):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.labels[i]


def as_pil(pixels):
    image = pytest.importorskip("PIL.Image")
    return [image.fromarray(np.moveaxis(each, 0, -1) if len(each) == 3 else each[0]) for each in pixels]


def as_tensors(pixels):
    torch = pytest.importorskip("torch")
    return [torch.from_numpy(each) for each in pixels]


@pytest.mark.parametrize("kind", [as_pil, as_tensors, lambda pixels: list(np.moveaxis(pixels, 1, -1))])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_kept(kind, channels):
    images, labels = image_arrays(Pairs(kind(PIXELS[:, :channels])))
    np.testing.assert_array_equal(images, PIXELS[:, :channels])
    assert images.dtype == np.uint8
    assert (labels.dtype, labels.tolist()) == (np.int64, LABELS)


def test_floats_stay_floats():
    images, _ = image_arrays(Pairs(as_tensors(PIXELS / 255)))
    np.testing.assert_array_equal(images, (PIXELS / 255).astype(np.float32))
    assert images.dtype == np.float32


def test_images_without_a_channel():
    flat = list(PIXELS[:, 0])
    for kind in (flat, as_tensors(PIXELS[:, 0])):
        np.testing.assert_array_equal(image_arrays(Pairs(kind))[0], PIXELS[:, :1])


def test_refusals_name_the_item():
    whole = list(np.moveaxis(PIXELS, 1, -1))
    for images, labels, message in [
        ([], [], "at least one image, got none"),
        ([*whole[:2], whole[2][:3]], LABELS, r"got uint8 \(3, 3, 6\) at item 2"),
        ([whole[0], whole[1] / 255], LABELS, r"like the first one, uint8 .* got float32 .* at item 1"),
        ([whole[0], whole[1] / 100], LABELS, "item 1: expected floats from 0 to 1, got 0"),
        ([whole[0].astype(np.int64)], LABELS, "item 0: expected two or three axes of uint8 or floats, got int64"),
        (whole, [1, "cat", 2, 3, 4], "item 1: invalid literal"),
    ]:
        with pytest.raises(ValueError, match=message):
            image_arrays(Pairs(images, labels))
    with pytest.raises(ValueError, match="item 0"):
        image_arrays(whole)
