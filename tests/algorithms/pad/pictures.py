"""Pictures of 8x8 in three shapes, and settings of a run of all parts on them in a second or two.

As a script: pictures.py FOLDER runs in FOLDER/killed, killed at random moments, and in FOLDER/through; says how often.
"""

import sys
from pathlib import Path

import torch

import ghostgram as gg
from algorithms.forks import until_done
from ghostgram.algorithms.pad import Settings

CLASSES, SIZE = 3, 8
NAMES = ["dot", "bar", "cross"]
SETTINGS = Settings(
    ipc=2, beta=0.01, steps=4, target_epochs=1, start_bound=2, start_end=3, expand_iters=4, batch=4, alpha=0.25,
    iterations=6, lr_images=0.5, lr_labels=0.5, lr_beta=1e-7, threshold=5.0, checkpoint_every=4, whitening="standard",
    width=4, depth=2, scorer_runs=2, scorer_epoch=1, init_ratio=0.5, add_end=2, experts=2, expert_epochs=4,
    expert_batch=16, eval_every=3, eval_nets=2, eval_epochs=5, full_epochs=1, val_fraction=0.2, seed=3,
)  # fmt: skip


def pictures(n=120, seed=0, channels=1):
    """(n, channels, 8, 8) in [0, 1], and their classes."""
    chance = torch.Generator().manual_seed(seed)
    shapes = torch.zeros(CLASSES, SIZE, SIZE)
    shapes[0, 3:5, 3:5] = 1
    shapes[1, 3:5, :] = 1
    shapes[2] = torch.maximum(torch.eye(SIZE), torch.eye(SIZE).flip(0))
    labels = torch.arange(n) % CLASSES
    noise = 0.25 * torch.randn(n, channels, SIZE, SIZE, generator=chance)
    return (0.2 + 0.6 * shapes[labels][:, None] + noise).clamp(0, 1), labels


def run(folder):
    gg.pad(*pictures(), folder, preset=SETTINGS, test=pictures(60, 1), classes=NAMES, progress=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    home = Path(sys.argv[1])
    import ghostgram.algorithms.pad.run  # before forks, each of which would have to import it

    kills = until_done(lambda: run(home / "killed"), 7, (0.05, 0.4), 2)
    run(home / "through")
    print(kills)
