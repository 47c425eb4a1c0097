"""Experts that are trained in a moment."""

import os
import signal
import time
from functools import partial

import torch
from torch import nn

from ghostgram.algorithms.pad.augment import Dsa
from ghostgram.algorithms.pad.convnet import ConvNet
from ghostgram.algorithms.pad.experts import record

MODEL = partial(ConvNet, 1, 3, 4, 1, 8)
EXPERTS, EPOCHS, IMAGES = 2, 3, 30
SHORT = {"experts": 1, "epochs": 2, "batch": IMAGES}


def data(n=IMAGES, classes=3, size=8, seed=0):
    """Images of a few kinds, with noise, and their kinds."""
    chance = torch.Generator().manual_seed(seed)
    kinds, labels = torch.randn(classes, 1, size, size, generator=chance), torch.arange(n) % classes
    return kinds[labels] + 0.5 * torch.randn(n, 1, size, size, generator=chance), labels


def recorded(folder, **named):
    """A store of tiny experts."""
    given = {"experts": EXPERTS, "epochs": EPOCHS, "batch": 16, "augment": Dsa(3, 8), "progress": False, **named}
    images, labels = given.pop("data", None) or data()
    return record(given.pop("make_model", MODEL), images, labels, folder, given.pop("recipe", "datm"), **given)


def files(folder):
    """Every file of a folder, by name; the log's lines in an order of their own."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {name: sorted(content.split(b"\n")) if name == "done.jsonl" else content for name, content in found.items()}


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 3))

    def forward(self, x):
        return self.net(x)


def sleep_or(what, item):
    """Item 0 takes its time; the other one fails, or its process dies."""
    if item == 0:
        time.sleep(300)
    if what == "fail":
        raise ValueError(f"item {item} is wrong")
    os.kill(os.getpid(), signal.SIGKILL)
