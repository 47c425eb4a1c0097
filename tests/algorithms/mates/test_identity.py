"""Identities depend on contents alone, and on all of them."""

import hashlib
import json
import struct

import numpy as np
import pyarrow as pa
import pytest

from ghostgram.algorithms.mates.files.identity import (
    _bytes_of,
    content_key,
    digest_of_bytes,
    digest_of_file,
    doc_id,
    logical_digest,
)


def test_document_is_named_by_its_users_id_else_by_its_text():
    assert doc_id("cœur") == hashlib.blake2b("cœur".encode(), digest_size=16).digest()
    assert doc_id("cœur", "17") == doc_id(None, "17") == doc_id("17") != doc_id("cœur")
    assert doc_id("") != doc_id(" ")
    with pytest.raises(ValueError, match="expected a text or a user_id"):
        doc_id()


def test_file_is_named_by_its_bytes(tmp_path):
    data = np.random.default_rng(0).bytes((1 << 21) + 7)  # more than two reads
    path = tmp_path / "file"
    path.write_bytes(data)
    assert digest_of_file(path) == digest_of_file(str(path)) == digest_of_bytes(data)
    with path.open("rb") as opened:
        assert digest_of_file(opened) == digest_of_bytes(data)


def test_work_is_named_by_its_canonical_json():
    key = content_key("score", {"b": 1, "a": [1, 2.5, None, "ß"]}, {"pool": "p"})
    text = '{"config":{"a":[1,2.5,null,"ß"],"b":1},"inputs":{"pool":"p"},"kind":"score","schema":1}'
    assert key == hashlib.sha256(text.encode()).hexdigest()
    assert key == content_key("score", {"a": (1, 2.5, None, "ß"), "b": 1}, {"pool": "p"})
    others = [("label", {}, {}), ("score", {"a": 1}, {}), ("score", {}, {"a": "1"}), ("score", {}, {})]
    assert len({content_key(*each) for each in others}) == 4
    with pytest.raises(ValueError, match="JSON"):
        content_key("score", {"a": float("nan")}, {})
    with pytest.raises(TypeError):
        content_key("score", {"a": np.float32(1)}, {})


def rows(n, seed=0):
    chance = np.random.default_rng(seed)
    return pa.table(
        {
            "doc_id": pa.array([chance.bytes(16) for _ in range(n)], pa.binary(16)),
            "domain": pa.array(chance.choice(["a", "b", "", None], n), pa.string()),
            "z": pa.array(chance.standard_normal(n).astype(np.float32)),
            "audit": pa.array(chance.choice([True, False, None], n), pa.bool_()),
            "n": pa.array(chance.choice([0, 5, None], n), pa.int32()),
        }
    )


def by_hand(table):
    """The digest as its docstring says it, a value at a time."""
    names, total = sorted(table.column_names), 0
    header = json.dumps([[n, str(table.schema.field(n).type)] for n in names], separators=(",", ":")).encode()
    person = hashlib.blake2b(header, digest_size=16).digest()
    forms = {"z": "<f", "audit": "<?", "n": "<i"}
    for row in table.to_pylist():
        data = b""
        for name in names:
            value = row[name]
            if name == "domain":
                packed = hashlib.blake2b((value or "").encode(), digest_size=16).digest()
            else:
                packed = value if name == "doc_id" else struct.pack(forms[name], value or 0)
            data += b"\1" + packed if value is not None else b"\0" + bytes(len(packed))
        total += int.from_bytes(hashlib.blake2b(data, digest_size=16, person=person).digest(), "little")
    return total % (1 << 128)


def test_rows_are_digested_as_documented():
    table = rows(500)
    assert logical_digest(table) == by_hand(table) > 0
    assert logical_digest(table[:0]) == 0


def test_rows_are_digested_in_any_order_chunks_and_parts():
    table = rows(70_000)  # more than are laid out at a time
    whole = logical_digest(table)
    shuffled = table.take(np.random.default_rng(1).permutation(len(table))).select(
        ["z", "n", "audit", "domain", "doc_id"]
    )
    assert logical_digest(shuffled) == whole
    assert logical_digest(pa.concat_tables([table[40:], table[:40]])) == whole
    assert (logical_digest(table[:12_345]) + logical_digest(table[12_345:])) % (1 << 128) == whole


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("doc_id", bytes(16)), ("domain", "c"), ("domain", None), ("z", 0.5), ("z", -0.0), ("audit", None), ("n", None),
        ("n", 6),
    ],
)  # fmt: skip
def test_one_other_value_is_another_digest(column, value):
    start = {"doc_id": bytes(15) + b"\1", "domain": "", "z": 0.0, "audit": False, "n": 0}
    schema = rows(0).schema
    table = pa.Table.from_pylist([start, start], schema)
    other = pa.Table.from_pylist([{**start, column: value}, start], schema)
    assert logical_digest(table) != logical_digest(other) != 0


def test_bytes_that_no_value_owns_do_not_count():
    held = [pa.py_buffer(b"\0"), pa.py_buffer(b"\7" * 32)]  # two nulls, with something where their values would be
    nulls = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), 2, held)
    assert logical_digest(pa.table({"a": nulls})) == logical_digest(pa.table({"a": pa.nulls(2, pa.binary(16))}))
    ids = rows(9)["doc_id"].combine_chunks()
    assert (_bytes_of(ids.slice(4), "a") == _bytes_of(pa.array(ids.to_pylist()[4:], pa.binary(16)), "a")).all()


def test_names_and_types_count_and_nested_ones_are_refused():
    table = pa.table({"a": pa.array([1], pa.int32())})
    digests = {
        logical_digest(each)
        for each in (table, table.rename_columns(["b"]), table.cast(pa.schema([("a", pa.uint32())])), table[:0])
    }
    assert len(digests) == 4
    with pytest.raises(TypeError, match="lists: expected numbers"):
        logical_digest(pa.table({"lists": [[1], [2]]}))
