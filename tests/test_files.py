"""Files and folders appear whole, are on the disk when they do, and leave nothing behind when they do not."""

import os
import stat

import pytest

from ghostgram import _files
from ghostgram._files import TORN, sweep, whole_file, whole_folder


def fill_file(path, text):
    path.write_text(text)


def fill_folder(path, text):
    (path / "deep").mkdir()
    (path / "deep/inner").write_text(text)
    (path / "outer").write_text(text)


def contents(path):
    return path.read_text() if path.is_file() else {p.name: p.read_text() for p in path.rglob("*") if p.is_file()}


KINDS = pytest.mark.parametrize(
    ("whole", "fill", "mode"), [(whole_file, fill_file, 0o644), (whole_folder, fill_folder, 0o755)]
)


@KINDS
def test_what_was_written_has_its_name_and_others_may_read_it(tmp_path, whole, fill, mode):
    with whole(tmp_path / "below/name") as temporary:
        fill(temporary, "all of it")
        assert not (tmp_path / "below/name").exists()
        assert temporary.parent == tmp_path / "below"  # one file system: a rename cannot become a copy
    found = contents(tmp_path / "below/name")
    assert found in ("all of it", {"inner": "all of it", "outer": "all of it"})
    assert stat.S_IMODE((tmp_path / "below/name").stat().st_mode) == mode
    assert os.listdir(tmp_path / "below") == ["name"]


@KINDS
def test_a_failure_leaves_nothing(tmp_path, whole, fill, mode):
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "name") as temporary:
        fill(temporary, "half of it")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@KINDS
def test_contents_are_on_the_disk_before_the_name_and_the_name_before_it_returns(
    tmp_path, monkeypatch, whole, fill, mode
):
    synced = []
    monkeypatch.setattr(_files, "_to_disk", lambda path: synced.append((path.name, (tmp_path / "name").exists())))
    with whole(tmp_path / "name") as temporary:
        fill(temporary, "all of it")
        expected = {path.name for path in [temporary, *temporary.rglob("*")]}
    assert {name for name, there in synced if not there} == expected
    assert synced[-1] == (tmp_path.name, True)


def test_a_file_is_replaced_and_a_folder_is_not(tmp_path):
    for text in ("old", "new"):
        with whole_file(tmp_path / "file") as temporary:
            temporary.write_text(text)
    assert contents(tmp_path / "file") == "new"
    (tmp_path / "folder").mkdir()
    with whole_folder(tmp_path / "folder") as temporary:  # an empty one is as good as none
        fill_folder(temporary, "old")
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "folder") as temporary:
        fill_folder(temporary, "new")
    assert contents(tmp_path / "folder") == {"inner": "old", "outer": "old"}
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_what_killed_processes_left_is_swept(tmp_path):
    (tmp_path / f"deep/.folder-1{TORN}/.file-2{TORN}").mkdir(parents=True)
    (tmp_path / f"deep/.file-3{TORN}").write_text("half")
    (tmp_path / f"deep/kept{TORN}").write_text("whole")  # no hidden name: not one of ours
    sweep(tmp_path)
    assert os.listdir(tmp_path / "deep") == [f"kept{TORN}"]
