"""A folder behaves the same on a local disk and on any file system of fsspec."""

import pytest

from ghostgram.algorithms.mates.files.places import Place, opened


@pytest.fixture(params=["local", "file", "memory"])
def place(request, tmp_path):
    if request.param == "memory":
        pytest.importorskip("fsspec")
        return Place(f"memory://places{tmp_path}/run/")
    return Place(f"{'file://' if request.param == 'file' else ''}{tmp_path}/run/")


def test_files_are_written_read_listed_and_replaced(place):
    assert (place.read("deep/a.json"), place.names("deep", ".json")) == (None, [])
    place.write("deep/b.json", b"1")
    place.write("deep/a.json", b"2")
    place.write("deep/a.json", b"3")
    place.write("deep/a.txt", b"4")
    place.write("deep/er/c.json", b"5")
    assert place.read("deep/a.json") == b"3"
    assert place.names("deep", ".json") == ["a", "b"]
    with opened(place / "deep/b.json") as file:
        assert file.read() == b"1"


def test_tree_of_files_comes_back_as_a_local_folder(place, tmp_path):
    tree = {"model.json": b"{}", "deep/er/weights": bytes(range(256))}
    for name, data in tree.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(data)
    place.write("model.json", b"of something cut short")
    place.write_tree(tmp_path / "model")
    with place.tree() as folder:
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == tree


def test_sweep_takes_only_what_was_cut_short(tmp_path):
    place = Place(tmp_path)
    place.write("commits/a.json", b"1")
    (tmp_path / "commits" / ".a.json-x1.tmp").write_bytes(b"2")
    (tmp_path / ".hidden").write_bytes(b"3")
    place.sweep()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".hidden", "a.json", "commits"]


def test_uri_that_nothing_knows_is_refused():
    pytest.importorskip("fsspec")
    with pytest.raises(ValueError, match="nowhere"):
        Place("nowhere://bucket/run")
