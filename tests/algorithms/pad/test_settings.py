"""Settings: each is checked and read, unknown ones are refused, and every preset is whole."""

import dataclasses

import pytest

from ghostgram.algorithms.pad import Settings, preset
from ghostgram.algorithms.pad.presets import by_name, without_pad


def test_every_preset_is_there_and_whole():
    found = by_name()
    rows = [f"{name}-{how}" for name in (
        "c10-1", "c10-10", "c10-50", "c10-500", "c10-1000", "c100-1", "c100-10", "c100-50", "c100-100", "tiny-1",
        "tiny-10", "tiny-50",
    ) for how in ("paper", "yaml")]  # fmt: skip
    assert set(found) == {*rows, "digits-1", "digits-10", "fashion-1", "fashion-10", "fashion-10-full",
                          "fashion-50-full"}  # fmt: skip
    for name, settings in found.items():
        assert settings.ipc == int(name.split("-")[1])
        assert settings.kept_epochs[-1] == settings.expert_epochs
        assert without_pad(settings).mask == "none"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("c10-10-paper", {"alpha": 0.25, "steps": 80, "expand_iters": 1000, "batch": 100, "lr_labels": 2.0}),
        ("c10-1-yaml", {"alpha": 0.0, "lr_beta": 1e-7, "threshold": 1.1, "batch": 10, "lr_images": 100.0}),
        ("c10-500-yaml", {"steps": 40, "start_first": 40, "start_bound": 60, "start_end": 70, "expand_iters": 2000}),
        ("c100-50-yaml", {"alpha": 0.0, "start_first": 20, "start_end": 70, "init": "real", "target_epochs": 2}),
        ("tiny-1-paper", {"lr_images": 10_000.0, "lr_beta": 1e-4, "depth": 4, "expand_iters": 6000, "steps": 60}),
        ("tiny-50-yaml", {"steps": 20, "batch": 1000, "start_first": 40, "start_bound": 70, "alpha": 0.5}),
    ],
)
def test_published_rows(name, expected):
    assert {key: getattr(preset(name), key) for key in expected} == expected


def test_the_schedule_of_cifar10_is_the_published_one():
    settings = preset("c10-50-paper")
    assert (settings.init_ratio, settings.add_end, settings.removals) == (0.75, 20, ((40, 0.1), (60, 0.2)))
    assert settings.kept_epochs == [*range(42), 100]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"lr_image: no such setting; did you mean lr_images\?"):
        Settings.from_mapping({"lr_image": 1.0})
    with pytest.raises(ValueError, match=r"preset: expected one of c10-1-paper, .*got 'cifar'"):
        preset("cifar")


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"ipc": 0}, ValueError, "ipc: expected at least 1, got 0"),
        ({"ipc": 1.5}, TypeError, "ipc: expected int, got 1.5"),
        ({"augment": "False"}, TypeError, "augment: expected bool, got 'False'"),
        ({"iterations": True}, TypeError, "iterations: expected int, got True"),
        ({"lr_images": float("nan")}, ValueError, "lr_images: expected at least 0"),
        ({"alpha": 1.0}, ValueError, "alpha: expected 0 <= alpha < 1, got 1.0"),
        ({"mask": "deep"}, ValueError, "mask: expected one of 'depth', 'error', 'none', got 'deep'"),
        ({"mask": "none"}, ValueError, 'alpha: expected 0 beside mask "none"'),
        ({"beta": 0.0}, ValueError, "beta: expected a number above 0"),
        ({"batch": 0}, ValueError, "batch: expected at least 1, got 0"),
        ({"start_first": 10}, ValueError, "start_first < start_bound <= start_end, got 10, 10, 20"),
        ({"expand_iters": None}, ValueError, "expand_iters: expected a number of iterations, got None"),
        ({"expert_epochs": 20}, ValueError, "expert_epochs: expected at least 21"),
        ({"recipe": "datm"}, ValueError, 'recipe: "datm" has no schedule'),
        ({"protocol": "release"}, ValueError, 'val_fraction: expected 0 beside protocol "release"'),
        ({"removals": [[40]]}, TypeError, "removals: expected pairs of an epoch and a share"),
    ],
)
def test_bad_settings_are_named(changes, kind, match):
    with pytest.raises(kind, match=match):
        Settings(**changes)


def test_settings_survive_json():
    settings = preset("c10-10-paper")
    assert Settings.from_mapping(settings.as_json()) == settings
    assert dataclasses.replace(settings, beta=1).beta == 1.0
