"""What memory the matching gradient takes, measured in a process of its own."""

import torch
from peers import memory

from ghostgram.algorithms.pad import mask
from ghostgram.algorithms.pad.convnet import ConvNet
from ghostgram.algorithms.pad.flat import Flat
from ghostgram.algorithms.pad.inner import Problem
from ghostgram.algorithms.pad.match import match


def peaks_beside_kept_weights(numbers_of_steps):
    """steps -> MiB at most in use, less the weights that are kept for the way back."""
    torch.set_num_threads(1)
    net, n = ConvNet(3, 10, 16, 1, 32), 30
    flat, images, labels = Flat(net), torch.randn(n, 3, 32, 32), torch.randn(n, 10)
    start = flat.vector(net)
    peaks = {}
    for steps in (numbers_of_steps[0], *numbers_of_steps):  # the first warms up what is allocated once
        case = Problem(flat, start, start + 0.1, mask.none(), steps, lambda i: torch.arange(n), lambda i, x, b: x)
        with memory.pages_of_their_own():
            before = memory.start()
            match(case, images, labels, 0.01)
            peaks[steps] = memory.peak_since(before) - (steps + 1) * flat.P * 4 / 2**20
    return peaks
