"""What is committed is read back; what is damaged, stale or means something else is redone or refused."""

import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from algorithms.mates import killing
from algorithms.mates.killing import rows
from ghostgram.algorithms.mates.files.identity import digest_of_bytes, logical_digest
from ghostgram.algorithms.mates.files.store import SIGN, Stage, StoreError

TESTS = Path(__file__).parents[2]


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path / "run", 2, "score", "abc")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_what_is_committed_is_read_in_the_order_of_units(stage, tmp_path):
    first, second = rows(30, 1), rows(20, 2)
    stage.begin(pool="p")
    assert stage.manifest["state"] == "open"
    stage.commit("000001", second, {"z": {"sum": -(1 << 200)}}, input="b")
    stage.commit("000000", first, input="a")
    assert sorted(files(tmp_path)) == [
        f"run/stage-2/score/abc/{name}"
        for name in ("commits/000000.json", "commits/000001.json", "manifest.json", "part-000000.parquet",
                     "part-000001.parquet")
    ]  # fmt: skip
    assert stage.read().equals(pa.concat_tables([first, second]))
    assert stage.read(["z"]).column_names == ["z"]
    done = stage.committed()
    assert list(done) == ["000000", "000001"] == stage.names()
    assert pq.read_table(stage.paths()[1]).num_rows == 20
    assert done["000001"].sums["z"]["sum"] == -(1 << 200)  # to the last digit
    assert done["000001"].rows == 20
    assert int(done["000000"].logical, 16) == logical_digest(first)
    manifest = stage.complete(base_loss=1.5)
    assert manifest == stage.manifest == stage.require(pool="p", base_loss=1.5)
    assert (manifest["units"], manifest["rows"], manifest["sign"]) == (2, 50, SIGN)
    assert int(manifest["logical"], 16) == (logical_digest(first) + logical_digest(second)) % (1 << 128)


def test_same_rows_give_the_same_bytes_however_they_are_chunked(stage):
    table = rows(5000, 0)
    stage.commit("0", table)
    before = files(stage.folder)
    stage.commit("0", pa.concat_tables([table[:1], table[1:77], table[77:]]))
    assert files(stage.folder) == before
    stage.commit("0", table.slice(1))
    assert files(stage.folder) != before


def test_stage_may_lie_on_any_file_system():
    pytest.importorskip("fsspec")
    stage = Stage("memory://bucket/run", 1, "label", "k")
    assert (stage.names(), stage.manifest) == ([], None)
    stage.begin()
    stage.commit("0", rows(9, 0))
    stage.complete()
    again = Stage("memory://bucket/run", 1, "label", "k")
    assert again.require()["rows"] == 9
    assert again.read().equals(rows(9, 0))


def test_empty_part_and_empty_stage(stage):
    with pytest.raises(StoreError, match="no committed part"):
        stage.read()
    assert stage.commit("0", rows(0, 0)).rows == 0
    assert stage.read().schema.names == ["doc_id", "domain", "z"]
    assert stage.complete()["logical"] == "0" * 32


@pytest.mark.parametrize("unit", ["", "../x", "a/b", ".hidden", "-x"])
def test_name_of_a_unit_is_one_of_a_file(stage, unit):
    with pytest.raises(ValueError, match="unit: expected letters"):
        stage.commit(unit, rows(1, 0))
    assert files(stage.folder) == {}


def test_what_json_cannot_hold_is_refused_before_anything_is_written(stage):
    with pytest.raises(ValueError, match="JSON"):
        stage.commit("0", rows(1, 0), {"z": float("nan")})
    with pytest.raises(TypeError):
        stage.commit("0", rows(1, 0), {"z": Fraction(1, 3)})
    with pytest.raises(ValueError, match="sign is said by the store"):
        stage.complete(sign="loss, lower is better")
    assert files(stage.folder) == {}


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    return bytes([*data[:-9], data[-9] ^ 1, *data[-8:]])


def other_sum(data):
    return data.replace(b'"sum": 5', b'"sum": 6')


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("part-1.parquet", cut), ("part-1.parquet", flip), ("part-1.parquet", None), ("commits/1.json", cut),
        ("commits/1.json", None), ("commits/1.json", other_sum), ("commits/1.json", lambda data: b"[]"),
    ],
)  # fmt: skip
def test_unit_with_a_damaged_file_is_not_done(stage, file, change):
    for unit in "012":
        stage.commit(unit, rows(10, int(unit)), {"sum": 5}, input="a")
    whole = files(stage.folder)
    stage.complete()
    path = Path(stage.folder, file)
    data = path.read_bytes()
    path.write_bytes(change(data)) if change else path.unlink()
    assert change is None or path.read_bytes() != data
    assert list(stage.committed()) == ["0", "2"]
    assert len(stage.read()) == 20
    with pytest.raises(StoreError, match=r"manifest\.json: units: expected 3, got 2"):
        stage.require()
    stage.commit("1", rows(10, 1), {"sum": 5}, input="a")
    stage.require()
    assert {name: data for name, data in files(stage.folder).items() if name != "manifest.json"} == whole


def test_commit_of_another_input_or_another_unit_is_not_done(stage):
    stage.commit("0", rows(10, 0), input="a")
    stage.commit("1", rows(10, 1), input="b")
    assert list(stage.committed({"0": "a", "1": "b"})) == ["0", "1"]
    assert list(stage.committed({"0": "changed", "1": "b"})) == ["1"]
    assert list(stage.committed({"1": "b"})) == ["1"]
    for kind, end in (("commits/", ".json"), ("part-", ".parquet")):  # one unit's files under another's name
        Path(stage.folder, f"{kind}2{end}").write_bytes(Path(stage.folder, f"{kind}1{end}").read_bytes())
    assert list(stage.committed()) == ["0", "1"]


def test_rows_changed_after_completion_are_refused(stage):
    stage.commit("0", rows(10, 0))
    stage.complete()
    stage.commit("0", rows(10, 1))
    for refused in (stage.require, stage.complete):
        with pytest.raises(StoreError, match=r"manifest\.json: logical: expected"):
            refused()


def resealed(record, **changed):
    record = {name: value for name, value in {**record, **changed}.items() if name != "seal"}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return json.dumps({**record, "seal": digest_of_bytes(text.encode())})


def test_manifest_that_says_something_else_is_refused(stage):
    with pytest.raises(StoreError, match=r"abc/manifest\.json: does not exist"):
        stage.require()
    stage.begin(reference="r1")
    stage.commit("0", rows(10, 0))
    with pytest.raises(StoreError, match="state: expected 'complete', got 'open'"):
        stage.require()
    stage.begin(reference="r1")
    with pytest.raises(StoreError, match=r"manifest\.json: reference: expected 'r2', got 'r1'"):
        stage.begin(reference="r2")
    assert not stage.is_complete
    stage.complete()
    assert stage.is_complete
    with pytest.raises(StoreError, match=r"manifest\.json: reference: expected 'r2', got 'r1'"):
        stage.require(reference="r2")
    path = Path(stage.folder, "manifest.json")
    good = path.read_text()
    path.write_text(resealed(json.loads(good)))
    stage.require()  # the seal is as documented
    for changed in ({"sign": "loss, lower is better"}, {"schema": 2}, {"kind": "label"}, {"key": "abd"}):
        path.write_text(resealed(json.loads(good), **changed))
        with pytest.raises(StoreError, match=rf"manifest\.json: {next(iter(changed))}: expected"):
            stage.require()
    for damaged in (good.replace("r1", "r2"), good.replace("higher", "lower"), good[:-9], ""):
        path.write_text(damaged)
        with pytest.raises(StoreError, match=r"manifest\.json: damaged"):
            stage.require()


def test_part_of_another_sign_is_refused(stage, monkeypatch):
    monkeypatch.setattr("ghostgram.algorithms.mates.files.store.SIGN", "loss, lower is better")
    stage.commit("0", rows(3, 0))
    monkeypatch.undo()
    with pytest.raises(StoreError, match=r"part-0\.parquet: expected sign 'influence, higher is better', got 'loss"):
        stage.read()


@pytest.fixture(scope="module")
def wreck(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wreck")
    script = [sys.executable, killing.__file__, str(folder)]
    done = subprocess.run(
        script, env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, timeout=60, text=True
    )
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * 10, done.stderr
    whole = Stage(folder / "whole", 1, "score", "abc")
    whole.commit("0", rows(10, 0))
    whole.commit("1", rows(50, 1))
    return folder, files(whole.folder)


@pytest.mark.parametrize("point", killing.POINTS)
@pytest.mark.parametrize("file", killing.ENDS)
def test_process_killed_while_it_commits_leaves_a_whole_unit_or_none(wreck, point, file):
    folder, whole = wreck
    stage = Stage(folder / point / file, 1, "score", "abc")
    left = files(stage.folder)
    assert any(".tmp" in name for name in left) == (point in ("mid-write", "after fsync"))
    assert list(stage.committed()) == ["0", "1"][: 1 + (file == "commit" and point in ("after rename", "after commit"))]
    stage.commit("1", rows(50, 1))
    stage.complete()
    after = files(stage.folder)
    assert after.pop("manifest.json")
    assert after == whole
