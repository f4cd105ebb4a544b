"""A census counts contents, not names; what is deleted or replaced counts no more, and ratios are of known pairs."""

from dataclasses import replace
from typing import Any

from adapters_store.census import Census, take_census
from adapters_store.info import AdapterInfo, BaseName, ModuleCount, RankRange
from adapters_store.records import Record
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import Upload

INFO = AdapterInfo(
    "a", 1, "d", "lora", (), RankRange(4, 4), ModuleCount(1, 1), 8, 100, BaseName("b", "f"), "", "upload", {}, None, ()
)


def record(digest: str | None, **changes: Any) -> Record:
    return Record(1, "upload", digest, replace(INFO, **changes), {})


def compressed(digest: str, source: str, size: int, error: float, **said: str) -> Record:
    compression = {"relative_error": error, **said}
    return record(digest, bytes=size, compression=compression, provenance={"type": "compress", "source": source})


def test_counts() -> None:
    current = [
        record("d1"),
        record("d1"),
        record("d2", kind="vera"),
        record(None),
        compressed("d3", "d1", 30, 0.1, dtype="int8"),
        compressed("d4", "gone", 20, 0.3),
    ]
    here = {"d1": 1.0, "d2": 0.5, "d3": 1.0, "d4": 0.0}
    census = take_census(current, {"d1": 100, "d3": 30}, lambda record: here[str(record.manifest)])
    assert census == Census(
        disk=frozenset({"d1", "d3"}),
        absent=frozenset({"d2", "d4"}),
        kinds={"lora": 3, "vera": 1},
        compressed={"int8": 1, "native": 1},
        bytes=30,
        original_bytes=100,
        errors=(0.1, 0.3),
    )


def test_of_nothing() -> None:
    assert take_census([], {}, lambda record: 1.0) == Census()


def test_of_a_store(registry: AdapterRegistry, upload: Upload) -> None:
    """Two names of one content, one replaced, one deleted: two contents are left."""
    kept = upload("a", 0)[0].digest
    upload("same", 0)
    upload("b", 1)
    replaced = upload("b", 2, replace=True)[0].digest
    upload("gone", 3)
    registry.delete("gone")
    census = registry.catalogue.census()
    assert census.disk | census.absent == {kept, replaced}
    assert not census.disk & census.absent
    assert sum(census.kinds.values()) == 2


def test_downloads_are_timed_where_there_are_any(registry: AdapterRegistry, upload: Upload) -> None:
    digest = upload("a", 0)[0].digest
    before = registry.catalogue.fetch_seconds().count
    registry.load(digest)
    found = registry.catalogue.fetch_seconds()
    assert found.count - before == (0 if digest in registry.catalogue.census().disk else 3)  # manifest, config, weights
