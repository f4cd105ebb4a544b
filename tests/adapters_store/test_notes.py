"""Notes beside the log: kept, replaced, removed, and no part of what the store counts."""

from pathlib import Path

import pytest
from obstore.store import MemoryStore

from adapters_store.bucket import Bucket
from adapters_store.local import LocalObjects
from adapters_store.log import Log
from adapters_store.objects import Objects


@pytest.fixture(params=["folder", "memory"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "folder":
        return LocalObjects(tmp_path / "store")
    return Objects(Bucket(MemoryStore()), shared=False, staging=tmp_path / "staging")


def test_notes_are_kept_until_they_are_removed(objects: Objects) -> None:
    notes = Log(objects).notes
    assert notes.all() == {}
    notes.put("a", {"x": 1})
    notes.put("ab", {"x": [1, {"y": None}]})
    notes.put("a", {"x": 2})
    assert Log(objects).notes.all() == {"a": {"x": 2}, "ab": {"x": [1, {"y": None}]}}
    assert Log(objects).records() == []
    assert Log(objects).sizes() == {}
    notes.remove("a")
    notes.remove("a")
    assert notes.all() == {"ab": {"x": [1, {"y": None}]}}


def test_damaged_notes_are_left_out(objects: Objects) -> None:
    notes = Log(objects).notes
    notes.put("good", {})
    objects.publish({"jobs/bad.json": b"{", "jobs/list.json": b"[]", "jobs/bytes.json": b"\xff"})
    assert notes.all() == {"good": {}}
    notes.remove("bad")
    assert "jobs/bad.json" not in objects.sizes("jobs/")
