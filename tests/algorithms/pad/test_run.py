"""The whole of PAD on small pictures: what is left in its folder, what may change it, and what may not."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ghostgram as gg
from algorithms.pad.pictures import NAMES, SETTINGS, pictures
from ghostgram.algorithms.pad import DistilledSet, Run, Settings
from ghostgram.algorithms.pad import groundwork as stages
from ghostgram.algorithms.pad.convnet import ConvNet
from ghostgram.algorithms.pad.flat import Flat
from ghostgram.algorithms.pad.initial import Panel, initial
from ghostgram.algorithms.pad.state import ChangedError

TESTS = Path(__file__).parents[2]
IMAGES, LABELS = pictures()
TEST = pictures(60, 1)


def distilled(folder, settings=SETTINGS, test=TEST, **more):
    return gg.pad(IMAGES, LABELS, folder, preset=settings, test=test, classes=NAMES, progress=False, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pad") / "run"
    return folder, distilled(folder)


def arrays(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def test_what_is_left_in_the_folder(finished):
    folder, made = finished
    assert {path.name for path in folder.iterdir()} == {
        *("run.json", "log.jsonl", "checkpoint.pt", "initial.npz", "last.npz", "distilled.npz", "distilled.pt"),
        *("evaluation.npz", "data"),
    }
    assert (made.ipc, made.classes) == (2, NAMES)
    assert made.images.shape == (6, 1, 8, 8)
    assert made.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.allclose(made.targets.sum(1), torch.ones(6))
    for name in ("distilled.npz", "distilled.pt"):
        read = DistilledSet.load(folder / name)
        for field in dataclasses.fields(DistilledSet):
            one, other = getattr(read, field.name), getattr(made, field.name)
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name
    facts = json.loads((folder / "run.json").read_text())
    assert Settings.from_mapping(facts["settings"]) == SETTINGS
    assert set(facts["seconds"]) == {"scores", "experts", "distillation", "evaluation"}
    assert facts["experts"]["kept"] == [0.5, 0.75, 1.0, 1.0]


def test_pixels_are_images_before_whitening(finished):
    _, made = finished
    beginning = DistilledSet.load(finished[0] / "initial.npz")
    far = (beginning.pixels[:, None] - IMAGES).flatten(2).abs().amax(2)
    assert far.amin(1).max() < 1e-6
    assert torch.equal(LABELS[far.argmin(1)], beginning.labels)
    moved, of = made.pixels - beginning.pixels, made.images - beginning.images
    assert torch.allclose(moved, of * (moved.norm() / of.norm()), atol=1e-6)
    assert moved.norm() > 0


def test_results_are_counted_from_predictions(finished):
    folder, made = finished
    said = arrays(folder / "evaluation.npz")
    assert said["distilled"].shape == (2, 60)
    assert np.array_equal(said["labels"], TEST[1].numpy())
    for name, each in made.results["test"].items():
        assert each == pytest.approx((said[name] == said["labels"]).mean(1))
    assert {*said} >= {
        *("distilled", "where it began", "random images, hard labels", "random images, experts' labels"),
        *("k-centre images, hard labels", "all images, as experts", "all images, with momentum"),
    }


def test_five_lines_train_on_it(finished):
    data = DistilledSet.load(finished[0] / "distilled.npz")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    before = nn.functional.cross_entropy(net(data.images), data.targets)
    optimizer = torch.optim.SGD(net.parameters(), data.beta, momentum=0.9, weight_decay=5e-4)
    for _ in range(30):
        nn.functional.cross_entropy(net(data.images), data.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert nn.functional.cross_entropy(net(data.images), data.targets) < before


def test_test_labels_change_no_image(finished, tmp_path):
    folder, _ = finished
    wrong = (TEST[0], TEST[1].roll(1))
    other = distilled(tmp_path, test=wrong, shared=folder / "data", full_epochs=0)
    assert other.results["test"]["distilled"] != finished[1].results["test"]["distilled"]
    for name in ("initial", "last", "distilled"):
        one, two = (arrays(place / f"{name}.npz") for place in (folder, tmp_path))
        assert all(np.array_equal(one[n], two[n]) for n in one if n != "facts")


def test_what_is_done_is_not_done_again(finished, tmp_path, monkeypatch):
    folder, made = finished
    torch.manual_seed(0)
    before = torch.get_rng_state()
    monkeypatch.setattr(stages, "score", None)
    again = distilled(folder)
    assert torch.equal(again.images, made.images)
    assert again.results == made.results
    other = distilled(tmp_path, shared=folder / "data", seed=4, data_seed=SETTINGS.seed, test=None)
    assert other.results["test"] == {}
    assert not torch.equal(other.images, made.images)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_data_or_settings_are_refused(finished):
    folder, _ = finished
    with pytest.raises(ChangedError, match=r"alpha: 0.25 before, 0.5 now"):
        distilled(folder, alpha=0.5)
    with pytest.raises(ChangedError, match="dataset: "):
        gg.pad(IMAGES.flip(0), LABELS, folder, preset=SETTINGS, progress=False)


def test_another_environment_is_warned_of_and_other_experts_are_refused(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    facts["environment"]["torch"] = "1.0"
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    with pytest.warns(UserWarning, match=r"begun with torch 1.0, now "):
        distilled(tmp_path / "run")
    (store,) = (tmp_path / "run" / "data").glob("experts-*")
    lines = (store / "done.jsonl").read_text().splitlines(keepends=True)
    (store / "done.jsonl").write_text("".join([*lines, lines[0]]))  # as of a store that was recorded again
    with pytest.raises(ChangedError, match=r"experts_digest: '\w+' before, '\w+' now"):
        distilled(tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "kind", "match"),
    [
        ({"images": IMAGES * 2}, ValueError, r"images: expected pixels in \[0, 1\], got"),
        ({"images": IMAGES[:, :, :7]}, ValueError, r"images: expected square images .* got shape \(120, 1, 7, 8\)"),
        ({"images": IMAGES.long()}, TypeError, "images: expected uint8, float32 or float64, got torch.int64"),
        ({"labels": LABELS[1:]}, ValueError, r"labels: expected shape \(120,\)"),
        ({"labels": LABELS.float()}, TypeError, "labels: expected integers, got torch.float32"),
        ({"labels": LABELS + 1}, ValueError, "labels: expected 0 <= y < 3, got 1 to 3"),
        ({"ipc": 33}, ValueError, "ipc: expected at most 32, the images of class 0, got 33"),
        ({"preset": "digits-11"}, ValueError, "preset: expected one of"),
        ({"lr_image": 1.0}, ValueError, "lr_image: no such setting"),
        (
            {"val_fraction": 0.0, "protocol": "release", "test": None},
            ValueError,
            'test: expected .* protocol "release"',
        ),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(given, kind, match, tmp_path):
    called = {"images": IMAGES, "labels": LABELS, "preset": SETTINGS, "test": TEST, **given}
    with pytest.raises(kind, match=match):
        gg.pad(called.pop("images"), called.pop("labels"), tmp_path / "run", classes=NAMES, **called)
    assert not (tmp_path / "run" / "run.json").exists()


def test_every_setting_is_read(finished, tmp_path, monkeypatch):
    """Ways that exclude each other read different ones, so there are several runs."""
    read = Counter()

    class Watched(Settings):
        def __getattribute__(self, name):
            if not name.startswith("_"):
                caller = sys._getframe(1).f_code.co_filename
                read[name] += "settings.py" not in caller and "dataclasses" not in caller
            return super().__getattribute__(name)

        def as_json(self):
            return dataclasses.asdict(Settings(**{f.name: object.__getattribute__(self, f.name) for f in FIELDS}))

    FIELDS = dataclasses.fields(Settings)
    plain = {f.name: getattr(SETTINGS, f.name) for f in FIELDS}
    Run(IMAGES, LABELS, tmp_path / "a", Watched(**{**plain, "whitening": "zca"}), test=TEST, progress=False).finish()
    # Those of the start epochs are read by what the settings say of them.
    derived = {"start_bound", "start_end", "expand_iters", "data_seed"}
    assert {f.name for f in FIELDS} - {*(n for n, count in read.items() if count), *derived} == set()


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "datm", "init_ratio": 1.0, "add_end": 0, "mask": "none", "alpha": 0.0},
        {"mask": "error"}, {"labels": "hard"}, {"labels": "fixed", "init": "real"}, {"align": "block", "alpha": 0.6},
        {"gradient": "tesla", "matches": 2, "second": "jvp"}, {"val_fraction": 0.0, "protocol": "release"},
        {"whitening": "none", "augment": False, "inner_momentum": 0.5, "store": "sqrt", "chunk": 3},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)  # fmt: skip
def test_ways_to_run(changes, tmp_path):
    quick = dataclasses.replace(
        SETTINGS, iterations=2, eval_every=0, eval_epochs=2, eval_nets=1, full_epochs=0, **changes
    )
    made = distilled(tmp_path, quick)
    assert bool(made.images.isfinite().all())
    assert len(read_log(tmp_path)) == 3
    assert (made.label_logits is None) == (quick.labels == "hard")


def read_log(folder):
    return (folder / "log.jsonl").read_text().splitlines()


def test_labels_are_finite_where_no_expert_is_right():
    class Store(dict):
        experts, epochs = 2, (3,)

    net = ConvNet(1, 3, 4, 2, 8)
    flat = Flat(net)
    always_last = flat.vector(net)
    always_last[-1] += 1000.0
    panel = Panel(flat, Store({(e, 3): always_last.numpy() + e for e in range(2)}))
    with pytest.warns(UserWarning, match="initial: no expert"):
        begun = initial(panel, IMAGES, LABELS, classes=3, ipc=2)
    assert bool(begun.label_logits.isfinite().all())
    assert begun.notes == [
        "no expert classifies 2 images of class 0, 1 correctly: others were taken too",
        "no expert is right on 4 initial images: their labels are the mean over all experts",
    ]
    mean = torch.stack([panel.logits(e, begun.images) for e in range(2)]).mean(0)
    assert torch.allclose(begun.label_logits, mean)


def test_label_logits_are_the_mean_over_experts_that_are_right():
    class Store(dict):
        experts, epochs = 3, (1,)

    nets = [ConvNet(1, 3, 4, 2, 8) for _ in range(3)]
    flat = Flat(nets[0])
    panel = Panel(flat, Store({(e, 1): flat.vector(net).numpy() for e, net in enumerate(nets)}))
    logits, never = panel.labels(IMAGES, LABELS)
    with torch.no_grad():
        said = [net(IMAGES) for net in nets]
    wrong = 0
    for i, y in enumerate(LABELS):
        right = [z[i] for z in said if z[i].argmax() == y]
        wrong += not right
        assert torch.allclose(logits[i], torch.stack(right or [z[i] for z in said]).mean(0), atol=1e-5)
    assert never == wrong


def test_killed_runs_end_with_the_same_set(tmp_path):
    """A whole run, its experts and judges included, killed again and again: the files are those of one that was not."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "algorithms.pad.pictures", str(tmp_path)]
    done = subprocess.run(command, cwd=TESTS, env=environment, check=True, capture_output=True, text=True)
    assert int(done.stdout) >= 3
    for name in ("initial", "last", "distilled", "evaluation"):
        assert same(*(arrays(tmp_path / place / f"{name}.npz") for place in ("killed", "through"))), name
    assert not list((tmp_path / "killed").rglob("*.tmp"))
