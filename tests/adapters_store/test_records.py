"""Lines of the log: round trip, tombstones, and every kind of rot."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store import canonical, records
from adapters_store.info import Notice, RankRange

MANIFEST: dict[str, Any] = {
    "schema": 1,
    "kind": "lora",
    "base": {"id": "tiny", "fingerprint": "f" * 64},
    "forms": ["low_rank"],
    "modules": {"matched": 3, "total": 8},
    "rank": {"min": 2, "max": 4},
    "parameters": 96,
    "bytes": 500,
    "blobs": {"adapter_config.json": {"digest": "a" * 64, "size": 10}},
    "provenance": {"type": "upload"},
    "compression": None,
    "warnings": [{"code": "adapter_is_noop", "message": "zero"}],
}


def test_round_trip() -> None:
    record = records.decode("x", 3, records.encode(3, "upload", MANIFEST, "d" * 64))
    assert (record.version, record.event, record.manifest, record.deleted) == (3, "upload", "d" * 64, False)
    assert record.blobs == {"adapter_config.json": records.Blob("a" * 64, 10)}
    info = record.info
    assert (info.name, info.version, info.digest, info.rank) == ("x", 3, "d" * 64, RankRange(2, 4))
    assert info.warnings == (Notice("adapter_is_noop", "zero"),)
    assert info.created.endswith("+00:00")
    assert (info.knobs, info.virtual_tokens, info.invocation) == ({}, 0, ())


def test_what_few_adapters_have_is_told_too() -> None:
    more = {"knobs": {"rank": {"max": 4}}, "virtual_tokens": 8, "invocation": [3, 1]}
    info = records.decode("x", 3, records.encode(3, "upload", MANIFEST | more, "d" * 64)).info
    assert (info.knobs, info.virtual_tokens, info.invocation) == ({"rank": {"max": 4}}, 8, (3, 1))


def test_a_tombstone_has_no_content() -> None:
    record = records.decode("x", 2, records.encode(2, records.DELETED, None, None))
    assert (record.deleted, record.manifest, record.info.kind, record.info.digest) == (True, None, "deleted", "")


def test_two_writers_never_write_the_same_bytes() -> None:
    """A retry must be told from a rival, who may upload the same content in the same millisecond."""
    assert records.encode(1, "upload", MANIFEST, "d" * 64) != records.encode(1, "upload", MANIFEST, "d" * 64)


@given(position=st.integers(0), value=st.integers(0, 255))
def test_any_changed_byte_is_noticed(position: int, value: int) -> None:
    data = bytearray(records.encode(1, "upload", MANIFEST, "d" * 64))
    position %= len(data)
    changed = data[position] != value
    data[position] = value
    found = records.decode("x", 1, bytes(data))
    assert (found.event == records.UNREADABLE) == changed
    assert found.info.name == "x"


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"1", b"{}", b'{"check": 1}', b"\xff", b"[" * 5000, b'{"check": "", "version": 1}'],
)
def test_rubbish_is_unreadable_but_listed(data: bytes) -> None:
    found = records.decode("x", 7, data)
    assert (found.event, found.version, found.manifest) == (records.UNREADABLE, 7, None)
    assert found.info.warnings[0].code == "adapter_corrupt"
    assert not found.deleted


def test_a_record_under_another_version_is_unreadable() -> None:
    assert records.decode("x", 2, records.encode(1, "upload", MANIFEST, "d" * 64)).event == records.UNREADABLE


def test_a_sealed_record_of_another_shape_is_unreadable() -> None:
    body = {"version": 1, "event": "upload", "blobs": {}}
    sealed = canonical.dump({**body, "check": canonical.digest(canonical.dump(body))})
    assert json.loads(sealed)["event"] == "upload"
    assert records.decode("x", 1, sealed).event == records.UNREADABLE
