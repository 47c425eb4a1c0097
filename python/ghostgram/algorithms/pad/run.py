"""A run of PAD, whole: what distillation stands on, the distillation, and what nets learn from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ghostgram.algorithms.pad.difficulty.scores import Scores
from ghostgram.algorithms.pad.distill import Course, distill
from ghostgram.algorithms.pad.experts.store import Store
from ghostgram.algorithms.pad.facts import Facts, environment, reproducible
from ghostgram.algorithms.pad.gradient import mask as masks
from ghostgram.algorithms.pad.groundwork import Groundwork
from ghostgram.algorithms.pad.images.augment import Dsa
from ghostgram.algorithms.pad.initial import Initial, Panel, initial
from ghostgram.algorithms.pad.judging.judge import Judge
from ghostgram.algorithms.pad.matching import Matching
from ghostgram.algorithms.pad.outputs import DistilledSet
from ghostgram.algorithms.pad.presets import preset as named
from ghostgram.algorithms.pad.settings import Settings
from ghostgram.algorithms.pad.state import DistilledState, leads
from ghostgram.training.ranks import led


def pad(
    images: Any,
    labels: Any,
    run: str | Path,
    *,
    preset: str | Settings,
    test: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    model: Callable[[], nn.Module] | None = None,
    shared: str | Path | None = None,
    allow_changes: Sequence[str] = (),
    workers: int = 1,
    progress: bool = True,
    **changes: Any,
) -> DistilledSet:
    """Distils labelled images into a few synthetic ones by matching experts' trajectories (PAD).

        split, whiten   a tenth of the images is held out; pixels are whitened by the others
        score           EL2N = mean over runs of || softmax(z) - onehot(y) ||
        experts         nets trained on easy images first, then on all, then without the easiest
        distill         X, Y, beta to minimise E_t || m (theta_N - w_{t+M}) ||^2 / || m (w_t - w_{t+M}) ||^2, where w
                        are an expert's weights, theta_N those that N steps of SGD on X, Y lead to from w_t, and m is 1
                        for the deep parameters and 0 for the others
        evaluate        fresh nets trained on X, Y, beside nets trained on controls

    Every part is kept in `run` as it is done. Called again with the same arguments, after a kill at any moment, this
    goes on where it was and gives the same bits, on the same device, number of threads and versions. Of several
    processes of torch.distributed all call this alike: they share the matches of an iteration (`matches`), and the
    first does the rest.

    Args:
        images: (n, C, H, H) training images, floating in [0, 1] or uint8, tensor or array; everything runs on their
            device.
        labels: (n,) integers, 0 <= y < classes.
        run: The folder of the run.
        preset: The name of a preset, see `presets.preset`, or settings.
        test: (images, labels) that nets are judged by once, at the end; they change no image.
        classes: Names of the classes; their numbers by default.
        model: Makes the student, on the CPU, drawing by torch alone, and without buffers that a forward changes;
            ConvNet by default, of the settings' width and depth.
        shared: A folder for whitening, scores and experts that runs of the same data may share; `run`/data by default.
        allow_changes: Settings that may be other than those that the folder was begun with, such as ("iterations",).
        workers: Processes that train experts, and nets to be judged.
        progress: Whether bars show how far it is, where rich is installed.
        changes: Settings that are to be other than the preset's.

    Returns:
        The distilled set: the iterate that did best on the held-out images; the last one where none are held out.

    Raises:
        TypeError: An argument is of another type than said.
        ValueError: An argument or setting is not as said; the message names it.
        ChangedError: The folder was begun with other data or settings.
        DistillationStopped: Students no longer come near experts.

    Cost:
        An epoch of an expert: two forwards and backwards of every image. An iteration: 12 forwards of N batches, see
        `match`; its memory does not grow with N but for N + 1 vectors of weights. A validation: eval_nets eval_epochs
        forwards and backwards of the set. docs/algorithms/pad.md has times.

    Source:
        PAD (arXiv 2408.03360), on DATM (2310.05773), FTD (2211.11004) and MTT (2203.11932).
    """
    settings = named(preset) if isinstance(preset, str) else preset
    settings = Settings.from_mapping(changes, settings)
    return Run(
        images, labels, run, settings, test=test, classes=classes, model=model, shared=shared,
        allow_changes=allow_changes, workers=workers, progress=progress,
    ).finish()  # fmt: skip


class Run:
    """The parts of `pad`, to be had one by one; each is done when it is first asked for.

    Args:
        images: (n, C, H, H) training images, as in `pad`, like all that follows.
        labels: (n,) integers.
        run: The folder of the run.
        settings: The settings, whole: `preset(name)`, or what `dataclasses.replace` makes of it.
        test: (images, labels) that nets are judged by at the end.
        classes: Names of the classes.
        model: Makes the student; ConvNet by default.
        shared: A folder for what runs of the same data may share; `run`/data by default.
        allow_changes: Settings that may be other than those that the folder was begun with.
        workers: Processes that train experts, and nets to be judged.
        progress: Whether bars show how far it is.
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        run: str | Path,
        settings: Settings,
        *,
        test: tuple[Any, Any] | None = None,
        classes: Sequence[str] | None = None,
        model: Callable[[], nn.Module] | None = None,
        shared: str | Path | None = None,
        allow_changes: Sequence[str] = (),
        workers: int = 1,
        progress: bool = True,
    ) -> None:
        self.folder, self.settings = Path(run), settings
        self._facts, self._allow, self._progress = Facts(self.folder), tuple(allow_changes), progress
        with reproducible(settings.deterministic):
            self.ground = Groundwork(
                images, labels, Path(shared) if shared else self.folder / "data", settings,
                classes=classes, model=model, allow_changes=allow_changes, workers=workers, progress=progress,
            )  # fmt: skip
            self.judge = Judge(self.ground, test, workers)
        self.made_from = {**self.ground.made_from, "experts_key": self.ground.experts_key}
        facts = {"settings": settings.as_json(), "made_from": self.made_from}
        led(lambda: self._facts.claim(facts, allow_changes, environment(self.ground.device, settings.deterministic)))

    def finish(self) -> DistilledSet:
        """All parts, in order; writes the sets, the predictions, and `run.json`."""
        last, start = self.state, self.initial
        best = replace(last, **{n: v for n, v in last.best.items() if n != "accuracies"})
        with self._part("evaluation"):
            tested = led(lambda: self.judge.tested(self.folder, start, best, last))
        results = {"test": tested, "validation": last.best.get("accuracies", []), "iteration": best.iteration}
        sets = {
            "initial": self._set(start.images, self._first_labels, self.settings.beta, {}),
            "last": self._set(last.images, last.label_logits, float(last.beta), {}),
            "distilled": self._set(best.images, best.label_logits, float(best.beta), results),
        }
        if leads():
            for name, each in sets.items():
                each.save(self.folder / f"{name}.npz")
            sets["distilled"].save(self.folder / "distilled.pt")
        return sets["distilled"]

    @cached_property
    def scores(self) -> Scores:
        """How hard each training image is."""
        with self._part("scores"):
            return self.ground.scores

    @cached_property
    def store(self) -> Store:
        """The experts."""
        if self.settings.recipe == "pad":
            self.scores  # noqa: B018 (timed by itself)
        with self._part("experts"):
            store = self.ground.store
        schedule, epochs = self.ground.schedule, range(self.settings.expert_epochs)
        kept = [schedule.share(e) if schedule else 1.0 for e in epochs]
        accuracy = [[a if math.isfinite(a) else None for a in row] for row in store.accuracy.tolist()]
        self._facts.note("accuracy", experts=accuracy)
        self._facts.note("kept", experts=kept)
        return store

    @cached_property
    def initial(self) -> Initial:
        """Where distillation starts."""
        g, s = self.ground, self.settings
        with reproducible(s.deterministic):
            start = initial(
                Panel(g.flat, self.store),
                g.images,
                g.labels,
                classes=len(g.classes),
                ipc=s.ipc,
                init=s.init,
                seed=s.seed,
            )
        self._facts.note("initial", notes=start.notes)
        return start

    @cached_property
    def state(self) -> DistilledState:
        """The end of the distillation."""
        s, start = self.settings, self.initial
        mask = {
            "depth": lambda: masks.depth(s.alpha, s.align),
            "error": lambda: masks.by_error(s.alpha),
            "none": masks.none,
        }[s.mask]()
        augment = Dsa(s.seed, start.images.shape[-1]) if s.augment else None
        matching = Matching(s, self.ground.flat, self.store, mask, augment)
        with self._part("distillation"), _bar(self._progress, s.iterations) as told:
            of = {**self.made_from, "experts_digest": self.ground.experts_digest, **s.as_json()}
            course = Course(self.folder, of, self._allow, self.judge.validation(), told)
            return distill(matching, start.images, self._first_labels, course)

    @property
    def _first_labels(self) -> Tensor:
        return self.initial.labels if self.settings.labels == "hard" else self.initial.label_logits

    def _set(self, images: Tensor, labels: Tensor, beta: float, results: dict[str, Any]) -> DistilledSet:
        return DistilledSet(
            images=images, pixels=self.ground.whitening.inverse(images), labels=self.initial.labels,
            label_logits=labels if labels.is_floating_point() else None, beta=beta, classes=self.ground.classes,
            whitening=self.ground.whitening.digest, config={**self.made_from, **self.settings.as_json()},
            results=results,
        )  # fmt: skip

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """A part that is timed, under the settings' modes."""
        began = time.perf_counter()
        with reproducible(self.settings.deterministic):
            yield
        self._facts.note(name, seconds=round(time.perf_counter() - began, 3))


@contextmanager
def _bar(wanted: bool, iterations: int) -> Iterator[Callable[[DistilledState], None]]:
    """A bar over iterations, where it is wanted and rich is installed."""
    if not (wanted and leads() and find_spec("rich")):
        yield lambda state: None
        return
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("distilling", total=iterations)
        yield lambda state: bar.update(task, completed=state.iteration)
