"""What tests of examples have in common: an example as a module, and text of made-up words."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from ghostgram import data

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def examples(monkeypatch):
    """Imports an example by name, with its neighbours in reach."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (EXAMPLES / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def made_up_words(monkeypatch):
    """Makes the domains that are named texts of 30 words over their letters; the others cannot be had."""

    def make(alphabets):
        def load_text(name):
            if name not in alphabets:
                raise data.DomainUnavailable(f"{name}: the registry is closed")
            generator = np.random.default_rng(len(name))
            words = ["".join(generator.choice(list(alphabets[name]), 3)) for _ in range(30)]
            return [" ".join(generator.choice(words, 300)) for _ in range(20)]

        monkeypatch.setattr(data, "load_text", load_text)

    return make
