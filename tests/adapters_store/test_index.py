"""The index in memory, against a plain dictionary."""

import itertools
import threading

from hypothesis import given
from hypothesis import strategies as st

from adapters_store import records
from adapters_store.index import Index
from adapters_store.records import Record
from tests.adapters_store.test_records import MANIFEST


def record(name: str, version: int, digest: str | None) -> Record:
    event, manifest = ("upload", MANIFEST) if digest else (records.DELETED, None)
    return records.decode(name, version, records.encode(version, event, manifest, digest))


def test_versions_may_come_in_any_order_and_twice() -> None:
    index = Index()
    for version in (3, 1, 2, 3, 1):
        index.put("t", "a", record("a", version, str(version)))
    assert [item.version for item in index.versions("t", "a")] == [1, 2, 3]
    current = index.current("t", "a")
    assert current is not None
    assert current.version == 3
    assert index.by_digest("t", "2") == ("a", 2)
    assert index.version("t", "a", 4) is None


def test_the_newest_versions_tombstones_included() -> None:
    index = Index()
    assert index.newest("t", "a") == 0
    assert index.heads() == {}
    for name, version, digest in (("a", 2, None), ("a", 1, "x"), ("b", 1, "y")):
        index.put("t", name, record(name, version, digest))
    assert index.newest("t", "a") == 2
    assert index.newest("u", "a") == 0
    assert index.heads() == {("t", "a"): 2, ("t", "b"): 1}


def test_a_digest_has_a_current_holder_whatever_the_order() -> None:
    held = [("a", record("a", 1, "x")), ("b", record("b", 1, "x")), ("b", record("b", 2, "y"))]
    for order in itertools.permutations(held):
        index = Index()
        for name, item in [*order, *order]:
            index.put("t", name, item)
        assert index.by_digest("t", "x") == ("a", 1)
        index.put("t", "a", record("a", 2, None))
        assert index.by_digest("t", "x") == ("b", 1)  # both are past now: the later one
        index.put("t", "a", record("a", 3, "x"))
        assert index.by_digest("t", "x") == ("a", 3)


def test_a_late_old_tombstone_does_not_delete() -> None:
    index = Index()
    index.put("t", "a", record("a", 3, "x"))
    index.put("t", "a", record("a", 2, None))
    assert index.names("t", "", 10) == ["a"]


def test_tenants_do_not_meet() -> None:
    index = Index()
    index.put("one", "a", record("a", 1, "x"))
    assert index.current("two", "a") is None
    assert index.by_digest("two", "x") is None
    assert index.names("two", "", 10) == []
    assert index.near("two", "a") == []
    assert len(index.all_current()) == 1


def test_near_names() -> None:
    index = Index()
    for name in ("legal-v1", "legal-v2", "medical", "zebra", *[f"noise{n:04}" for n in range(500)]):
        index.put("t", name, record(name, 1, name))
    assert set(index.near("t", "legal-v3")) == {"legal-v1", "legal-v2"}
    assert index.near("t", "medcal") == ["medical"]
    assert index.near("t", "qqqq") == []


_steps = st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=30)


@given(steps=_steps, size=st.integers(1, 4))
def test_pages_show_exactly_the_live_names_in_order(steps: list[tuple[str, bool]], size: int) -> None:
    index, last = Index(), dict.fromkeys("abcdef", 0)
    live: set[str] = set()
    for name, upload in steps:
        last[name] += 1
        index.put("t", name, record(name, last[name], f"{name}{last[name]}" if upload else None))
        live = live | {name} if upload else live - {name}
    pages: list[str] = []
    after = ""
    while page := index.names("t", after, size):
        pages += page
        after = page[-1]
    assert pages == sorted(live)
    assert {item.info.name for item in index.all_current()} == live


def test_readers_see_whole_versions_while_writers_write() -> None:
    index = Index()
    prepared = [record("a", version, str(version)) for version in range(1, 200)]

    def write() -> None:
        for item in prepared:
            index.put("t", "a", item)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        versions = [item.version for item in index.versions("t", "a")]
        assert versions == list(range(1, len(versions) + 1))
    writer.join()
    assert len(index.versions("t", "a")) == 199
