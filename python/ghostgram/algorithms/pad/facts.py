"""What the folder of a run says of itself, and the modes that its parts run under."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ghostgram._files import sweep, write_atomically
from ghostgram.algorithms.pad.state import leads, refuse_changes

FACTS = "run.json"


class Facts:
    """`run.json`: settings, made_from, environment, notes (by part), experts and seconds (by part)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def claim(self, mine: Mapping[str, Any], allow_changes: Collection[str], environment: Mapping[str, Any]) -> None:
        """Writes what the folder is of.

        Args:
            mine: "settings" and "made_from".
            allow_changes: Names in either that may be other than before.
            environment: What may change the last bits.

        Raises:
            ChangedError: The folder is of something else.
        """
        if before := self.read():
            now, then = ({**each["made_from"], **each["settings"]} for each in (mine, before))
            refuse_changes(then, now, allow_changes, self._folder)
            for name, value in environment.items():
                if before["environment"].get(name) != value:
                    warnings.warn(
                        f"{self._folder}: begun with {name} {before['environment'].get(name)}, now {value}: what is"
                        " done from here on may differ in its last bits from an undisturbed run",
                        stacklevel=4,
                    )
        if leads():  # another process could sweep away what this one has begun to write since
            sweep(self._folder)
            kept = {name: before.get(name, {}) for name in ("seconds", "notes", "experts")}
            self._write({**mine, "environment": environment, **kept})

    def note(self, part: str, **news: Any) -> None:
        """Adds what a part found; its seconds stay those of the process that did it first."""
        if leads():
            facts = self.read()
            for name, value in news.items():
                facts[name] = {**facts[name], part: facts[name].get(part, value) if name == "seconds" else value}
            self._write(facts)

    def read(self) -> dict[str, Any]:
        """All of them; {} before any."""
        path = self._folder / FACTS
        return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}

    def _write(self, facts: Mapping[str, Any]) -> None:
        write_atomically(self._folder / FACTS, json.dumps(facts, indent=1) + "\n")


@contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """Inside, kernels that give the same bits each time and no TF32, where wanted; outside as before."""
    if not wanted:
        yield
        return
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    tf32 = cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True)
        cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = False, False, False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = tf32


def environment(device: torch.device, deterministic: bool) -> dict[str, Any]:
    """What may change the last bits."""
    return {
        "ghostgram": version("ghostgram"), "torch": torch.__version__, "python": platform.python_version(),
        "machine": platform.machine(), "device": str(device), "threads": torch.get_num_threads(),
        "deterministic kernels": deterministic, "TF32": not deterministic,
    }  # fmt: skip
