"""Taps of convolutions: by unfolding and by projection alike, the dots of a loop over single samples."""

import pytest
import torch
from torch import nn

from ghostgram.taps import Taps, conv, cover
from single_samples import (
    B,
    CalledTwice,
    ChannelsLast,
    Checkpointed,
    Tower,
    assert_agrees,
    assert_autocast_agrees,
    in_dtype,
    real,
)


class Narrow(Tower):
    """Through a view whose samples are not next to each other."""

    def forward(self, x):
        return torch.tanh(self.layer(x[:, :, ::2].transpose(2, 3)))


class Sized(Tower):
    """A transposed convolution asked for an output size."""

    def forward(self, x):
        return torch.tanh(self.layer(x, output_size=[12, 8]))


C = 4
conv1d, conv2d, conv3d = nn.Conv1d, nn.Conv2d, nn.Conv3d
back1d, back2d, back3d = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d

MODELS = {
    "1d": (lambda: Tower(conv1d(C, 6, 3)), real(C, 9)),
    "2d": (lambda: Tower(conv2d(C, 6, 3, padding=1)), real(C, 5, 7)),
    "3d": (lambda: Tower(conv3d(C, 3, (1, 2, 3))), real(C, 3, 4, 5)),
    "stride, padding, dilation": (lambda: Tower(conv2d(C, 6, (3, 2), (2, 3), (2, 1), (1, 2))), real(C, 8, 9)),
    "dilated 1d": (lambda: Tower(conv1d(C, 6, 3, padding=4, dilation=4)), real(C, 9)),
    "patches": (lambda: Tower(conv2d(3, 8, 4, 4)), real(3, 8, 12)),
    "patches with a rest": (lambda: Tower(conv2d(3, 8, 4, 5)), real(3, 8, 12)),
    "1x1": (lambda: Tower(conv2d(C, 6, 1)), real(C, 3, 5)),
    "no bias": (lambda: Tower(conv2d(C, 6, 3, bias=False)), real(C, 5, 5)),
    "same": (lambda: Tower(conv2d(C, 6, 3, padding="same", dilation=2)), real(C, 5, 5)),
    "same, one more on the right": (lambda: Tower(conv2d(C, 6, (4, 3), padding="same")), real(C, 5, 5)),
    "valid": (lambda: Tower(conv1d(C, 6, 3, padding="valid")), real(C, 9)),
    "reflect": (lambda: Tower(conv2d(C, 6, 3, padding=(2, 1), padding_mode="reflect")), real(C, 5, 5)),
    "replicate": (lambda: Tower(conv3d(C, 3, 3, padding=1, padding_mode="replicate")), real(C, 3, 2, 3)),
    "circular": (lambda: Tower(conv1d(C, 6, 4, padding="same", padding_mode="circular")), real(C, 9)),
    "groups": (lambda: Tower(conv2d(C, 6, 3, groups=2, padding=1)), real(C, 5, 5)),
    "depthwise": (lambda: Tower(conv2d(C, C, 3, groups=C, padding=1)), real(C, 5, 5)),
    "depthwise, two each": (lambda: Tower(conv1d(C, 2 * C, 3, groups=C)), real(C, 9)),
    "transposed 1d": (lambda: Tower(back1d(C, 6, 3, 2)), real(C, 5)),
    "transposed 2d": (lambda: Tower(back2d(C, 6, 3, (2, 3), 1, (1, 2))), real(C, 3, 4)),
    "transposed 3d": (lambda: Tower(back3d(C, 3, 2)), real(C, 2, 3, 2)),
    "transposed, grouped, dilated": (lambda: Tower(back2d(C, 6, 3, 2, 1, 2, groups=2, dilation=3)), real(C, 3, 3)),
    "transposed, depthwise": (lambda: Tower(back2d(C, C, 3, groups=C, bias=False)), real(C, 3, 4)),
    "transposed to a size": (lambda: Sized(back2d(C, 6, 3, 2)), real(C, 5, 3)),
    "called twice": (lambda: CalledTwice(conv2d(C, C, 3, padding=1)), real(C, 5, 5)),
    "channels last": (lambda: ChannelsLast(conv2d(C, 6, 3)), real(C, 5, 5)),
    "strided view": (lambda: Narrow(conv2d(C, 6, 3)), real(C, 10, 5)),
    "checkpointed": (lambda: Checkpointed(conv2d(C, 6, 3), False), real(C, 5, 5)),
    "checkpointed, reentrant": (lambda: Checkpointed(conv2d(C, 6, 3), True), real(C, 5, 5)),
}  # fmt: skip


@pytest.fixture(params=["unfolded", "unfolded in pieces", "projected"])
def way(request, monkeypatch):
    """Either way whatever it costs; in pieces of a line of positions each."""
    monkeypatch.setattr(conv, "unfolds", lambda *_, **__: request.param != "projected")
    if request.param == "unfolded in pieces":
        monkeypatch.setattr(conv, "PIECE", 1)
    return request.param


@pytest.mark.parametrize("late", [False, True], ids=["directions known", "directions late"])
@pytest.mark.parametrize("name", MODELS)
def test_dots_and_gradients(name, late, way):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, x = in_dtype(*MODELS[name], dtype)
        assert_agrees(model, x, tolerance, late)
        if not late:
            assert_agrees(model, x, tolerance, gradients=False)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", ["2d", "transposed 2d"])
def test_one_of_two_parameters_frozen(name, frozen, way):
    model, x = in_dtype(*MODELS[name], torch.float64)
    getattr(model.layer, frozen).requires_grad_(False)
    assert_agrees(model, x, 1e-10)
    assert getattr(model.layer, frozen).grad is None


@pytest.mark.parametrize("name", ["2d", "depthwise", "transposed 2d", "reflect"])
def test_autocast_agrees_with_its_own_gradient(name, way):
    assert_autocast_agrees(*in_dtype(*MODELS[name], torch.float32))


def test_the_cheaper_way_by_shape():
    """What was measured: unfolding for wide layers or many directions, projection for narrow and depthwise ones."""
    unfolded = {(1, 768): True, (1, 256): True, (1, 64): False, (3, 64): True, (1, 1): False, (8, 1): False}
    for (directions, rows), expected in unfolded.items():
        D = torch.empty(directions, 4 * rows, 1, device="meta")
        assert conv.unfolds(D, groups=4, gradient=True) == expected
    D = torch.empty(2, 768, 1, device="meta")
    assert conv.unfolds(D, 1, gradient=False)
    assert not conv.unfolds(D[:1], 1, gradient=False)


def test_pieces_hold_what_they_may():
    """However large a sample, what is unfolded at a time is no more than PIECE bytes."""
    layer, x = conv2d(64, 8, 3, padding=1), torch.randn(3, 64, 120, 120)
    geometry = conv.Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    pieces = list(conv._pieces(x, layer(x), (3, 3), geometry))
    sizes = [a.numel() * a.element_size() for _, a, _ in pieces]
    assert len(pieces) == 6
    assert max(sizes) <= conv.PIECE
    assert sum(sizes) == 3 * 120 * 120 * 9 * 64 * 4


def test_inputs_without_a_sample_axis_and_packed_documents_are_errors():
    layer = conv2d(B, 6, 3)
    taps = Taps(cover(layer, layer.parameters()), [])
    with taps.samples(B, None), pytest.raises(ValueError, match=r"Conv2d: expected an input with a sample axis"):
        layer(torch.randn(B, 7, 7))
    with taps.samples(3, None), pytest.raises(ValueError, match=r"first dimension is the sample \(3\)"):
        layer(torch.randn(4, B, 7, 7))
    with taps.samples(B, None, segments=torch.zeros(B, 7, dtype=torch.long), documents=1):
        with pytest.raises(ValueError, match="Conv2d: mixes positions, so that packed documents"):
            layer(torch.randn(B, B, 7, 7))
