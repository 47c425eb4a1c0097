"""What nets learn from a distilled set, beside what they learn from as many other images; predictions are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ghostgram._files import whole_file
from ghostgram.algorithms.pad.evaluate import Evaluation, evaluate, random_real
from ghostgram.algorithms.pad.groundwork import Groundwork
from ghostgram.algorithms.pad.initial import Initial
from ghostgram.algorithms.pad.pixels import as_labels, as_pixels
from ghostgram.algorithms.pad.state import DistilledState, leads

PREDICTIONS = "evaluation.npz"
"""labels (n,) of the test images, and (nets, n) predictions by what the nets were trained on."""

T = TypeVar("T")


class Judge:
    """Trains fresh nets and asks them about images that they have not seen.

    Args:
        ground: Model, whitening and training images.
        test: (images, labels), as they were before whitening; None where there are none.
        workers: Processes that train nets.

    Raises:
        TypeError: Test images or labels are of another dtype.
        ValueError: They have another shape or range, or there are none and the settings' protocol needs them.
    """

    def __init__(self, ground: Groundwork, test: tuple[Any, Any] | None, workers: int) -> None:
        self._ground, self._settings, self._workers = ground, ground.settings, workers
        self._test: tuple[Tensor, Tensor] | None = None
        if test is not None:
            pixels = as_pixels(test[0], "test images").to(ground.images)
            truth = as_labels(test[1], pixels, len(ground.classes), "test labels")
            self._test = ground.whitening.apply(pixels), truth
        elif ground.settings.protocol == "release":
            raise ValueError(
                'test: expected images and labels beside protocol "release", which selects by them, got None'
            )

    def validation(self) -> Callable[[DistilledState], list[float]] | None:
        """How an iterate is judged while distilling; None where no image is held out."""
        g, s = self._ground, self._settings
        on = self._test if s.protocol == "release" else (g.val_images, g.val_labels)
        if on is None or not len(on[0]):
            return None
        nets = 1 if s.protocol == "release" else s.eval_nets

        def judged(state: DistilledState) -> list[float]:
            found = self._taught(state.images, state.label_logits, float(state.beta), on, nets, "validation nets")
            return [float(a) for a in found.accuracies]

        return lambda state: _from_first(lambda: judged(state))

    def tested(
        self, folder: Path, initial: Initial, best: DistilledState, last: DistilledState
    ) -> dict[str, list[float]]:
        """Accuracies on the test images, of nets trained on a distilled set and on controls; {} without test images.

        What the folder holds of them is read; it is written anew after each.
        """
        if self._test is None:
            return {}
        path, truth = folder / PREDICTIONS, self._test[1].cpu().numpy()
        found: dict[str, NDArray[np.int64]] = {}
        if path.exists():
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
        for name, work in self._arms(initial, best, last).items():
            if name not in found:
                found = {"labels": truth, **found, name: work()}
                with whole_file(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, **found)
        return {name: (said == truth).mean(1).tolist() for name, said in found.items() if name != "labels"}

    def _arms(
        self, initial: Initial, best: DistilledState, last: DistilledState
    ) -> dict[str, Callable[[], NDArray[np.int64]]]:
        """What nets are trained on, by name, and how their predictions on the test images come about."""
        g, s = self._ground, self._settings
        random = random_real(g.labels, s.ipc, s.seed)

        def taught(images: Tensor, labels: Tensor, beta: float) -> Callable[[], NDArray[np.int64]]:
            return lambda: self._taught(images, labels, beta, self._test, s.eval_nets, "test nets").predictions

        arms = {"distilled": taught(best.images, best.label_logits, float(best.beta))}
        if best.iteration != last.iteration:
            arms["last iterate"] = taught(last.images, last.label_logits, float(last.beta))
        labels = initial.labels if s.labels == "hard" else initial.label_logits
        arms["initial images and labels"] = taught(initial.images, labels, s.beta)
        arms["random real images, hard labels"] = taught(g.images[random], g.labels[random], s.beta)
        return arms

    def _taught(
        self, images: Tensor, labels: Tensor, beta: float, on: tuple[Tensor, Tensor], nets: int, stream: str
    ) -> Evaluation:
        s = self._settings
        return evaluate(
            self._ground.make_model, images, labels, beta, *on, nets=nets, epochs=s.eval_epochs, batch=s.eval_batch,
            augment=self._dsa(), seed=s.seed, workers=self._workers,
        )  # fmt: skip


def _from_first(work: Callable[[], T]) -> T:
    """What the first process finds, on all of them."""
    if not dist.is_initialized():
        return work()
    found = [work() if leads() else None]
    dist.broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]
