"""Absent backends are named skips: a room that cannot run here says why. And what several test files build."""

import pytest

from extension import Builder
from ghostgram import _dispatch


@pytest.fixture
def available():
    """available(op, backend) skips the test with the reason when that room cannot run here."""

    def check(op: str, backend: str) -> None:
        if reason := _dispatch.why_not(op, backend):
            pytest.skip(f"{op} on {backend}: {reason}")

    return check


@pytest.fixture(scope="session")
def builder(tmp_path_factory):
    """Builds extension modules from the sources; everything compiled once serves all tests."""
    return Builder(tmp_path_factory.mktemp("extensions"))
