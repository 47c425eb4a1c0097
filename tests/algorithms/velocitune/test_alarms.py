"""Each alarm is raised by what it is for, and not by what nearly is."""

from dataclasses import replace

import numpy as np
import pytest

from ghostgram.algorithms.velocitune.alarms import Sight, Watch

CALM = Sight(
    weights=np.array([0.5, 0.5]), floor=np.zeros(2), loss=np.array([2.0, 2.0]), se=np.array([0.01, 0.01]),
    velocity=np.array([0.6, 0.3]), gap=np.array([0.5, 0.5]), low=np.array([1.5, np.nan]), early=True,
    off=np.zeros(2), bound=1.0, epochs=np.array([1.0, 2.0]), cap=4.0,
)  # fmt: skip

CASES = {
    "largest": ({"weights": np.array([0.05, 0.95])}, {"weights": np.array([0.1, 0.9])}),
    "floor": (
        {"weights": np.array([0.89, 0.001]), "floor": np.array([0.0, 0.01])},
        {"weights": np.array([0.9, 0.1]), "floor": np.array([0.0, 0.1])},
    ),
    "noisy": ({"se": np.array([0.01, 0.06])}, {"se": np.array([0.01, 0.05])}),
    "easy": ({"loss": np.array([1.4, 1.4])}, {"loss": np.array([1.6, 1.4])}),
    "alike": ({"velocity": np.array([0.5, 0.515])}, {"velocity": np.array([0.5, 0.525])}),
    "share": ({"off": np.array([0.2, -1.2])}, {"off": np.array([0.9, -0.9])}),
    "epochs": ({"epochs": np.array([1.0, 4.1])}, {"epochs": np.array([1.0, 4.0])}),
}
DOMAIN = {"easy": "a", "alike": ""}


@pytest.mark.parametrize("name", CASES)
def test_alarm_and_near_miss(name):
    trips, misses = CASES[name]
    assert [alarm[:2] for alarm in Watch(["a", "b"]).look(replace(CALM, **trips))] == [(name, DOMAIN.get(name, "b"))]
    assert Watch(["a", "b"]).look(replace(CALM, **misses)) == []


def test_a_domain_that_left_its_interval_late_is_no_alarm():
    assert Watch(["a", "b"]).look(replace(CALM, loss=np.array([1.4, 1.4]), early=False)) == []


def test_three_rises_in_a_row_are_forgetting():
    watch = Watch(["a", "b"])
    heard = []
    for v in (0.2, 0.3, 0.4, 0.39, 0.5, 0.6):
        heard.append([alarm.name for alarm in watch.look(replace(CALM, velocity=np.array([0.9, v])))])
        saved = watch.state_dict()
        watch = Watch(["a", "b"])
        watch.load_state_dict(saved)  # a restart between any two updates
    assert heard == [[]] * 6
    assert [alarm[:2] for alarm in watch.look(replace(CALM, velocity=np.array([0.9, 0.7])))] == [("rising", "b")]


def test_rules_without_losses_have_calm_alarms():
    bare = replace(CALM, loss=None, se=None, velocity=None, gap=None, low=None, cap=None)
    assert Watch(["a", "b"]).look(bare) == []


def test_a_single_domain_has_all_the_weight():
    alone = Sight(np.ones(1), np.zeros(1), None, None, None, None, None, True, np.zeros(1), 1.0, np.ones(1), None)
    assert Watch(["a"]).look(alone) == []
