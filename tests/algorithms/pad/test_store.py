"""A store of trajectories is read row by row; what is damaged, lacking or of something else is refused by its place."""

import json

import numpy as np
import pytest

from algorithms.pad import tiny
from ghostgram.algorithms.pad.store import Store, StoreError, digest


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "store"
    tiny.recorded(folder, keep=[0, 2], facts={"zca": "abc"})
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy to do harm to."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def changed(path, at, bit=1):
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def parsed(text):
    """What lines of JSON say, or a text."""
    try:
        return [json.loads(line) for line in ([text] if text[:2] == b"{\n" else text.splitlines())]
    except ValueError:
        return text


def test_rows_are_parts_of_the_mapped_file(made):
    store = Store.open(made)
    assert (store.experts, store.epochs) == (2, (0, 2, 3))
    whole = np.fromfile(made / "experts.bin", "<f4").reshape(2, 3, store.header["parameters"])
    for expert in range(2):
        for place, epoch in enumerate(store.epochs):
            row = store[expert, epoch]
            assert row.dtype == np.float32
            assert np.array_equal(row, whole[expert, place])
            assert not row.flags.writeable  # so a step in place cannot change what others read
            assert isinstance(row.base, np.memmap) or isinstance(row.base.base, np.memmap)


def test_header_names_every_parameter_in_its_place(made):
    store, model = Store.open(made), tiny.MODEL()
    names = dict(model.named_parameters())
    assert store.header["names"] == list(names)
    assert store.header["shapes"] == [list(p.shape) for p in names.values()]
    assert store.header["offsets"] == [0, *np.cumsum([p.numel() for p in names.values()]).tolist()]
    assert store.header["facts"] == {"zca": "abc"}
    assert store.header["images"] == [tiny.IMAGES] * tiny.EPOCHS


def test_log_has_a_line_for_every_epoch_of_every_expert(made):
    lines = [json.loads(line) for line in (made / "done.jsonl").read_text().splitlines()]
    assert [(line["expert"], line["epoch"]) for line in lines] == [(e, t) for e in range(2) for t in range(4)]
    store = Store.open(made)
    assert all(line["digest"] == digest(store[line["expert"], line["epoch"]]) for line in lines if line["epoch"] != 1)
    assert np.isnan(store.loss[:, 0]).all()
    assert np.array_equal(store.loss[:, 1:].ravel(), [line["loss"] for line in lines if line["epoch"]])
    assert store.accuracy.shape == (2, 4)
    assert (store.accuracy[:, 1:] <= 1).all()


def test_every_flipped_bit_of_a_row_is_refused_with_its_place(folder):
    size = Store.open(folder).header["parameters"] * 4
    changed(folder / "experts.bin", (1 * 3 + 1) * size + size // 2)  # expert 1, the second kept epoch
    store = Store.open(folder)
    store[1, 0], store[1, 3], store[0, 2]
    with pytest.raises(StoreError, match=r"experts\.bin: expert 1, epoch 2: expected bytes of digest \w{32}, got"):
        store[1, 2]
    assert Store.open(folder, check=False)[1, 2].shape == (size // 4,)


@pytest.mark.parametrize(("name", "where"), [("header.json", r"header\.json"), ("done.jsonl", r"done\.jsonl: line \d")])
def test_every_flipped_bit_of_a_text_is_refused(folder, name, where):
    path = folder / name
    good, refused = path.read_bytes(), 0
    for at in range(0, len(good) - 1, 23):
        changed(path, at)
        if parsed(path.read_bytes()) == parsed(good):
            path.write_bytes(good)  # of layout, or beyond the digits that a number has
            continue
        with pytest.raises(StoreError, match=where):
            Store.open(folder)
        path.write_bytes(good)
        refused += 1
    assert refused > 20


def test_what_is_lacking_is_named(folder, tmp_path):
    with pytest.raises(StoreError, match=r"header\.json: does not exist"):
        Store.open(tmp_path / "nowhere")
    log = folder / "done.jsonl"
    good = log.read_bytes()
    log.write_bytes(good[:-1])  # torn: its last line does not count
    with pytest.raises(StoreError, match=r"expert 1, epoch 3 is not recorded: record\(\) with the same arguments"):
        Store.open(folder)
    log.write_bytes(good)
    rows = folder / "experts.bin"
    rows.write_bytes(rows.read_bytes()[:-4])
    with pytest.raises(StoreError, match=r"experts\.bin: expected \d+ bytes, got \d+"):
        Store.open(folder)
    rows.unlink()
    with pytest.raises(StoreError, match=r"experts\.bin: expected \d+ bytes, got no file"):
        Store.open(folder)


def test_what_a_reader_expects_is_held_against_the_header(made):
    said = Store.open(made).header
    Store.open(made, {"dataset": said["dataset"], "facts": {"zca": "abc"}, "kept": (0, 2, 3)})
    with pytest.raises(StoreError, match=r"header\.json: dataset: expected 'other', got '\w{32}'"):
        Store.open(made, {"dataset": "other"})
    with pytest.raises(StoreError, match=r"header\.json: kept: expected 0, 1, got 0, 2, 3"):
        Store.open(made, {"kept": [0, 1]})


def test_what_is_not_kept_is_no_place(made):
    store = Store.open(made)
    with pytest.raises(IndexError, match=r"epoch: expected a kept one \(0, 2, 3\), got 1"):
        store[0, 1]
    for expert in (-1, 2):
        with pytest.raises(IndexError, match=f"expert: expected 0 to 1, got {expert}"):
            store[expert, 0]


def test_halves_are_read_as_singles_and_their_error_is_known(made, tmp_path):
    whole, half = Store.open(made), tiny.recorded(tmp_path / "half", keep=[0, 2], dtype="float16")
    assert (tmp_path / "half" / "experts.bin").stat().st_size * 2 == (made / "experts.bin").stat().st_size
    assert half[1, 2].dtype == np.float32
    assert np.array_equal(half[1, 2], whole[1, 2].astype(np.float16))
    lines = map(json.loads, (tmp_path / "half" / "done.jsonl").read_text().splitlines())
    line = next(line for line in lines if (line["expert"], line["epoch"]) == (1, 2))
    exact = whole[1, 2].astype(np.float64)
    assert line["rounding"] == pytest.approx(np.linalg.norm(half[1, 2] - exact) / np.linalg.norm(exact), rel=1e-6)
    assert 1e-5 < line["rounding"] < 2**-11
    assert half.loss[1, 3] == whole.loss[1, 3]  # what is trained is not rounded
