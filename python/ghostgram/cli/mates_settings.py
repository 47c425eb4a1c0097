"""The file of settings by which `ghostgram mates` runs the stages of a run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ghostgram.algorithms.mates.files.pool import Pool

TABLES: dict[str, dict[str, tuple[type, ...]]] = {
    "": {"run": (str,), "seed": (int,)},
    "pool": {"paths": (str, list), **dict.fromkeys(("text", "id", "domain", "cluster", "n_tokens"), (str,))},
    "job": {"function": (str,)},  # and whatever the function takes
    "label": {
        "labels": (int,), "backend": (str,), "clip": (float, int), "lrs": (list,), "audit": (int,),
        "accept_rho": (float, int),
    },
    "fit": {"encoder": (str, dict), "previous": (str,)},
    "score": {"scorer": (str,), "engine": (str,), "workers": (int,), "gpus": (int,)},
    "select": {
        "tokens": (int,), "docs": (int,), "ratio": (float, int), "temperature": (float, int), "quotas": (dict,),
        "one_per": (str,), "reuse": (int,), "weights": (dict,),
    },
}  # fmt: skip
"""The tables of the file, what each may hold, and of which type."""


@dataclass(frozen=True)
class Settings:
    """A file of settings, checked; paths in it are seen from where the command runs."""

    run: Path
    seed: int
    tables: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Reads a TOML file.

        Raises:
            ValueError: It is no TOML, or a table or a name in it is unknown, of another type, or missing.
            ImportError: This Python is older than 3.11 and has no tomli.
        """
        held = _parsed(path)
        tables = {name: held.pop(name, {}) for name in TABLES if name}
        for name, table in {"": held, **tables}.items():
            _check(f"{path}: {f'[{name}] ' if name else ''}", table, name)
        for name, needed in (("run", held), ("paths", tables["pool"])):
            if name not in needed:
                raise ValueError(f"{path}: expected {name!r}{' in [pool]' if name == 'paths' else ''}, got none")
        return cls(Path(held["run"]), held.get("seed", 0), tables)

    def pool(self) -> Pool:
        """The documents to choose from."""
        return Pool(**self.tables["pool"])

    def job(self) -> tuple[Any, Any, Any, Any]:
        """Model, optimizer, references and task, as the function of [job] gives them.

        Raises:
            ValueError: There is no such function, or it gives something else.
        """
        given = dict(self.tables["job"])
        if "function" not in given:
            raise ValueError("[job] expected a function, as 'module:function', got none")
        name = given.pop("function")
        function = named(name)
        try:
            made = function(**given)
        except Exception as why:  # the caller's own, to be shown with where it comes from
            raise RuntimeError(f"[job] {name} failed") from why
        if not isinstance(made, tuple) or len(made) != 4:
            raise ValueError(f"[job] {name}: expected (model, optimizer, references, task), got {type(made).__name__}")
        model, optimizer, references, task = made
        return model, optimizer, list(references) if isinstance(references, (list, tuple)) else [references], task

    def encoder(self) -> Any:
        """The influence model's encoder: "auto", or one of a kind with settings of its own."""
        from ghostgram.algorithms.mates.influence import model as influence

        given = self.tables["fit"].get("encoder", "auto")
        if given == "auto":
            return given
        settings = {"kind": given} if isinstance(given, str) else dict(given)
        kind = settings.pop("kind", None)
        if "embed" in settings:
            settings["embed"] = named(settings["embed"])
        try:
            return influence.kind_of(kind)(**settings)
        except TypeError as why:
            raise ValueError(f"[fit.encoder] {why}") from why


def named(name: str) -> Any:
    """What 'module:name' names, modules of the working directory included.

    Raises:
        ValueError: There is none.
    """
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError, ValueError) as why:
        raise ValueError(f"expected 'module:name' of something that can be imported, got {name!r}: {why}") from why


def _parsed(path: Path) -> dict[str, Any]:
    parser = next((name for name in ("tomllib", "tomli") if find_spec(name) is not None), None)
    if parser is None:
        raise ImportError("settings are TOML, which this Python cannot read: pip install tomli")
    toml = import_module(parser)
    try:
        held: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, toml.TOMLDecodeError) as why:
        raise ValueError(f"{path}: expected a file of settings in TOML: {why}") from why
    return held


def _check(where: str, table: Any, name: str) -> None:
    known = TABLES[name]
    if not isinstance(table, dict):
        raise ValueError(f"{where}expected a table, got {table!r}")
    for key, value in table.items():
        if key not in known:
            if name == "job":
                continue
            tables = "" if name else f" and tables {', '.join(filter(None, TABLES))}"
            raise ValueError(f"{where}expected {', '.join(known)}{tables}, got {key!r}")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            kinds = " or ".join(kind.__name__ for kind in known[key])
            raise ValueError(f"{where}{key}: expected {kinds}, got {value!r}")
