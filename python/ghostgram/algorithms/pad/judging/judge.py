"""What nets learn from a distilled set, beside what they learn from other images; predictions are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ghostgram._files import write_arrays
from ghostgram.algorithms.pad.groundwork import Groundwork
from ghostgram.algorithms.pad.identity import digest_of
from ghostgram.algorithms.pad.images.augment import Dsa
from ghostgram.algorithms.pad.images.pixels import as_labels, as_pixels
from ghostgram.algorithms.pad.initial import Initial, Panel
from ghostgram.algorithms.pad.judging.controls import k_centre, random_real
from ghostgram.algorithms.pad.judging.evaluate import Evaluation, evaluate
from ghostgram.algorithms.pad.state import DistilledState, leads
from ghostgram.training.ranks import rank_and_size

PREDICTIONS = "evaluation.npz"
"""labels (n,) of the test images, and (nets, n) predictions by what the nets were trained on."""

T = TypeVar("T")
Predictions = NDArray[np.int64]


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
        return lambda state: _from_first(
            lambda: self._taught(state.images, state.label_logits, float(state.beta), on, nets).accuracies.tolist()
        )

    def tested(
        self, folder: Path, initial: Initial, best: DistilledState, last: DistilledState
    ) -> dict[str, list[float]]:
        """Accuracies on the test images by what nets were trained on: distilled sets and controls; {} without a test.

        What the folder holds of them is read; it is written anew after each.
        """
        if self._test is None:
            return {}
        path, truth = folder / PREDICTIONS, self._test[1].cpu().numpy()
        of = hashlib.blake2b(
            f"{digest_of(best.images, best.label_logits)} {digest_of(last.images, last.label_logits)} "
            f"{digest_of(*self._test)} {json.dumps(self._settings.as_json(), sort_keys=True)}".encode(), digest_size=16
        ).hexdigest()  # fmt: skip
        found = _read(path, of)
        for name, work in self._arms(initial, best, last, *self._test).items():
            if name not in found:
                found[name] = work()
                arrays: dict[str, Any] = {"of": of, "labels": truth, **found}
                write_arrays(path, **arrays)
        return {name: (said == truth).mean(1).tolist() for name, said in found.items()}

    def _arms(
        self, initial: Initial, best: DistilledState, last: DistilledState, images: Tensor, truth: Tensor
    ) -> dict[str, Callable[[], Predictions]]:
        """How the predictions on test images come about, by what nets are trained on."""
        s = self._settings

        def taught(of: Tensor, labels: Tensor, beta: float, epochs: int = s.eval_epochs) -> Callable[[], Predictions]:
            return lambda: self._taught(of, labels, beta, (images, truth), s.eval_nets, epochs).predictions

        arms = {"distilled": taught(best.images, best.label_logits, float(best.beta))}
        if best.iteration != last.iteration:
            arms["the last iterate"] = taught(last.images, last.label_logits, float(last.beta))
        return arms | (self._controls(initial, float(best.beta), images, taught) if s.controls else {})

    def _controls(
        self, initial: Initial, beta: float, images: Tensor, taught: Callable[..., Callable[[], Predictions]]
    ) -> dict[str, Callable[[], Predictions]]:
        """The same of other images: as many, trained on as the distilled ones are; and of all of them."""
        g, s = self._ground, self._settings
        panel, own = Panel(g.flat, g.store), g.labels.cpu().numpy()
        chosen = random_real(own, s.ipc, s.seed)
        random, classes = g.images[chosen], g.labels[chosen]

        def central() -> Predictions:
            centres = k_centre(g.images.flatten(1).cpu().numpy(), own, s.ipc)
            return taught(g.images[centres], g.labels[centres], beta)()

        def experts() -> Predictions:
            return np.stack([panel.logits(e, images).argmax(1).cpu().numpy() for e in range(g.store.experts)])

        began = initial.labels if s.labels == "hard" else initial.label_logits
        controls = {
            "where it began": taught(initial.images, began, s.beta),
            "random images, hard labels": taught(random, classes, beta),
            "random images, experts' labels": lambda: taught(random, panel.labels(random, classes)[0], beta)(),
            "k-centre images, hard labels": central,
            "all images, as experts": experts,
        }
        if s.full_epochs:
            controls["all images, with momentum"] = taught(g.images, g.labels, s.full_beta, s.full_epochs)
        return controls

    def _taught(
        self,
        images: Tensor,
        labels: Tensor,
        beta: float,
        on: tuple[Tensor, Tensor],
        nets: int,
        epochs: int | None = None,
    ) -> Evaluation:
        s = self._settings
        augment = Dsa(s.seed, images.shape[-1]) if s.augment else None
        return evaluate(
            self._ground.make_model, images, labels, beta, *on, nets=nets, epochs=epochs or s.eval_epochs,
            batch=s.eval_batch, augment=augment, seed=s.seed, workers=self._workers,
        )  # fmt: skip


def _read(path: Path, of: str) -> dict[str, Predictions]:
    """Predictions by name, if they are of these sets and settings."""
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return {n: file[n] for n in file.files if n not in ("of", "labels")} if str(file["of"]) == of else {}


def _from_first(work: Callable[[], T]) -> T:
    """What the first process finds, on all of them."""
    if rank_and_size()[1] == 1:
        return work()
    found = [work() if leads() else None]
    dist.broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]
