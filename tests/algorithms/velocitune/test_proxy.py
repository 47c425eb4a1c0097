"""Proxy runs: sizes, points, and a driver that is killed."""

import json

import pytest

from ghostgram.algorithms.velocitune.proxy import proxy_points, proxy_sizes
from ghostgram.algorithms.velocitune.targets import Point


def losses(tokens):
    return {"b": (2 + 1 / tokens, 0.01), "a": (1 + 1 / tokens, 0.02)}


def test_sizes():
    assert proxy_sizes(6400) == [100, 200, 400, 800, 1600]
    assert proxy_sizes(1000, 2, 0.1, 1.0) == [100, 1000]
    for wrong in ((6400, 1), (6400, 5, 0.5, 0.25), (6400, 5, 0.0, 0.25)):
        with pytest.raises(ValueError, match="count, smallest, largest: expected"):
            proxy_sizes(*wrong)
    with pytest.raises(ValueError, match="tokens: expected enough for 5 different sizes, got 40"):
        proxy_sizes(40)


def test_points():
    found = proxy_points(losses, [200, 100], size=7.0)
    assert list(found) == ["b", "a"]
    assert found["a"] == [Point(100, 1.01, 0.02, 7.0), Point(200, 1.005, 0.02, 7.0)]


def test_a_driver_that_was_killed_goes_on(tmp_path):
    record, started = tmp_path / "proxy.json", []

    def train(tokens):
        started.append(tokens)
        if started == [100, 200]:
            raise KeyboardInterrupt
        return losses(tokens)

    with pytest.raises(KeyboardInterrupt):
        proxy_points(train, [100, 200, 300], record=record)
    found = proxy_points(train, [100, 200, 300], record=record)
    assert started == [100, 200, 200, 300]
    assert found == proxy_points(losses, [100, 200, 300])
    assert proxy_points(train, [300, 100], record=record)["a"] == [found["a"][0], found["a"][2]]
    assert started == [100, 200, 200, 300]
    assert [path.name for path in tmp_path.iterdir()] == ["proxy.json"]


def test_what_cannot_be(tmp_path):
    for sizes in ([], [0, 1], [5, 5]):
        with pytest.raises(ValueError, match="sizes: expected different positive numbers"):
            proxy_points(losses, sizes)
    with pytest.raises(ValueError, match=r"train: expected losses of \['x'\] after 2 tokens, got those of \['y'\]"):
        proxy_points(lambda tokens: {"xy"[tokens - 1]: (1.0, 0.1)}, [1, 2])
    with pytest.raises(ValueError, match="train: expected finite losses of every domain after 3 tokens"):
        proxy_points(lambda tokens: {"x": (float("nan"), 0.1)}, [3], record=tmp_path / "proxy.json")
    assert not (tmp_path / "proxy.json").exists()
    for text in ("{", "[]", '{"5": {"a": 1}}', json.dumps({"x": {}})):
        (tmp_path / "proxy.json").write_text(text)
        with pytest.raises(ValueError, match="record: expected a file that proxy_points wrote"):
            proxy_points(losses, [1], record=tmp_path / "proxy.json")
