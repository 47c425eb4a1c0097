"""What nets learn from sets distilled by PAD, beside DATM at the same budget and as many real images.

    python benchmarks/algorithms/pad_experiment.py --data digits            # an hour and a half on one core
    python benchmarks/algorithms/pad_experiment.py --data fashion           # 5,000 images; three hours on one core
    python benchmarks/algorithms/pad_experiment.py --table

DATM is PAD without its two filters: experts see all images in every epoch, and all parameters are matched. All else is
the same: experts, epochs, iterations, augmentation, evaluation. Seeds are of the distillation and of the nets that are
judged; split, scores and experts are shared. Test images are looked at once. A run may be killed at any moment and
called again: it goes on where it was. Several may share the work by --ipc and --seed, once one has recorded the
experts. Results are kept in benchmarks/results/pad/<data>.json as they come.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ghostgram._files import write_atomically
from ghostgram.algorithms.pad import Run, Settings, preset
from ghostgram.algorithms.pad.judging.controls import split
from ghostgram.algorithms.pad.presets import without_pad
from ghostgram.algorithms.pad.state import read_log
from ghostgram.data import load_images

RESULTS = Path(__file__).parent.parent / "results/pad"
SAMPLES = {"digits": None, "fashion": 5000}
SETS = {"digits": "digits", "fashion": "fashion-mnist"}
IPCS, SEEDS, ARMS = (1, 10), (0, 1, 2), ("pad", "datm")


def settings(data: str, ipc: int, arm: str, seed: int) -> Settings:
    """Of one run; controls are judged beside PAD, those on all data once."""
    base = preset(f"{data}-{ipc}")
    base = base if arm == "pad" else without_pad(base)
    whole = arm == "pad" and ipc == IPCS[-1] and seed == SEEDS[0]
    return replace(base, seed=seed, data_seed=0, controls=arm == "pad", full_epochs=base.full_epochs if whole else 0)


def one(data: str, ipc: int, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """Results of one run, done as far as it is not."""
    found = load_images(SETS[data])
    images, labels = torch.from_numpy(found.train_images), torch.from_numpy(found.train_labels)
    if (samples := SAMPLES[data]) is not None:
        chosen = split(labels.numpy(), samples / len(labels), 0).held_out
        images, labels = images[chosen], labels[chosen]
    run = Run(
        images, labels, folder / f"{data}-{ipc}-{arm}-{seed}", settings(data, ipc, arm, seed),
        test=(found.test_images, found.test_labels), classes=found.classes, shared=folder / f"{data}-data",
    )  # fmt: skip
    made, state = run.finish(), run.state
    steps = [row for row in read_log(run.folder) if row["kind"] == "step"]
    losses = [loss for row in steps for loss in row["losses"] if loss is not None]
    return {
        **made.results, "beta": made.beta, "iterations": state.iteration, "left out": state.skipped,
        "first losses": statistics.fmean(losses[:50]), "last losses": statistics.fmean(losses[-50:]),
        "seconds of an iteration": statistics.median(row["seconds"] for row in steps),
    }  # fmt: skip


def kept(data: str) -> dict[str, Any]:
    """The results so far, by "<ipc> <arm> <seed>"."""
    path = RESULTS / f"{data}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def keep(data: str, key: str, made: dict[str, Any]) -> None:
    """Adds results to those that are there by now."""
    found = {**kept(data), key: made}
    text = json.dumps({key: found[key] for key in sorted(found)}, indent=1)
    write_atomically(RESULTS / f"{data}.json", text + "\n")


def table(data: str) -> None:
    """Accuracy on test images in %, by what nets were trained on."""
    found = kept(data)
    for ipc in IPCS:
        rows: dict[str, list[list[float]]] = {}
        for key, each in found.items():
            of, arm, _ = key.split()
            for name, accuracies in each["test"].items() if int(of) == ipc else ():
                label = f"{name}, by {arm.upper()}" if name in ("distilled", "the last iterate") else name
                rows.setdefault(label, []).append([100 * a for a in accuracies])
        print(f"\n{data}, {ipc} image{'s' * (ipc > 1)} per class\n")
        print("| nets trained on | mean | std over seeds | std over nets | mean of each seed |\n|---|---|---|---|---|")
        for label, seeds in sorted(rows.items(), key=lambda row: -statistics.fmean(map(statistics.fmean, row[1]))):
            means = [statistics.fmean(each) for each in seeds]
            over_seeds = f"{statistics.stdev(means):.2f}" if len(means) > 1 else ""
            over_nets = statistics.fmean(statistics.stdev(each) for each in seeds)
            shown = " ".join(f"{mean:.2f}" for mean in means)
            print(f"| {label} | {statistics.fmean(means):.2f} | {over_seeds} | {over_nets:.2f} | {shown} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(SETS), default="digits")
    parser.add_argument("--ipc", type=int, nargs="+", default=IPCS)
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--folder", type=Path, default=Path("build/pad-experiment"))
    parser.add_argument("--table", action="store_true", help="print what was found, and do nothing")
    options = parser.parse_args()
    if options.table:
        for data in SETS:
            table(data)
        return
    warnings.simplefilter("once")
    torch.set_num_threads(1)
    for ipc in options.ipc:
        for seed in options.seed:
            for arm in ARMS:
                key = f"{ipc} {arm} {seed}"
                if key not in kept(options.data):
                    made = one(options.data, ipc, arm, seed, options.folder)
                    keep(options.data, key, made)
                found = kept(options.data)[key]["test"]
                print(key, {name: round(statistics.fmean(each), 4) for name, each in found.items()}, flush=True)


if __name__ == "__main__":
    main()
