"""A bucket whose requests fail, one at a time and all at once: what was told is true, and nothing is half there."""

from collections.abc import Callable
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from adapters_store.bucket import Bucket
from adapters_store.errors import AdapterNotFound, OutcomeUnknown, StoreUnavailable
from adapters_store.log import Log
from adapters_store.objects import Objects
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.faults import FaultyBucket
from tests.adapters_store.support import BASE, factors, race, restarted, write

RECORD = ("names/t/n/1.json", b"one")
BLOBS = {"blobs/a": b"1", "blobs/b": b"2"}
Change = Callable[[AdapterRegistry, Path], object]
CHANGES: dict[str, Change] = {
    "upload": lambda registry, folder: registry.add("new", *write(folder, factors(7))),
    "replace": lambda registry, folder: registry.add("legal", *write(folder, factors(7)), replace=True),
    "delete": lambda registry, folder: registry.delete("legal"),
    "rollback": lambda registry, folder: registry.rollback("legal", 1),
}
BEFORE_AFTER = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


@BEFORE_AFTER
def test_a_lost_answer_of_a_publish(after: bool) -> None:
    sound = FaultyBucket(MemoryStore())
    Objects(sound).publish(BLOBS, RECORD)
    assert sound.names == ["put", "put", "create", "head", "head"]
    for at in range(1, 6):
        store = MemoryStore()
        objects = Objects(FaultyBucket(store, at, after=after))
        if at == 3:
            assert objects.publish(BLOBS, RECORD)  # its own write, found by the second attempt
        else:
            with pytest.raises(OutcomeUnknown if at > 3 else StoreUnavailable):
                objects.publish(BLOBS, RECORD)
        assert Objects(Bucket(store)).exists(RECORD[0]) == (at >= 3)


@BEFORE_AFTER
def test_a_lost_answer_is_not_taken_for_anothers_record(after: bool) -> None:
    objects = Objects(FaultyBucket(MemoryStore(), 1, after=after))
    Objects(Bucket(objects._bucket.store)).publish({}, (RECORD[0], b"theirs"))
    assert not objects.publish({}, RECORD)
    assert objects.get(RECORD[0]) == b"theirs"


@BEFORE_AFTER
def test_no_answer_at_all_says_so(after: bool) -> None:
    bucket = FaultyBucket(MemoryStore(), 3, 99, after=after)
    with pytest.raises(OutcomeUnknown) as caught:
        Objects(bucket).publish(BLOBS, RECORD)
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (503, "store_unavailable", 2.0)
    assert "Nothing was changed" not in caught.value.message
    assert "send the same again" not in caught.value.message, "a deletion could take what others uploaded since"
    assert "only an upload may simply be sent again" in caught.value.message
    assert bucket.names.count("create") == 3
    assert Objects(Bucket(bucket.store)).exists(RECORD[0]) == after


def test_a_plain_refusal_is_told_at_once() -> None:
    bucket = FaultyBucket(MemoryStore(), 1, 99)
    bucket.error = lambda: StoreUnavailable("no", code="store_denied")
    with pytest.raises(StoreUnavailable) as caught:
        Objects(bucket).publish({}, RECORD)
    assert caught.value.code == "store_denied"
    assert bucket.names == ["create"]


def test_what_a_collector_took_between_writing_and_committing_is_written_again() -> None:
    class Collected(Bucket):
        def create(self, key: str, data: bytes) -> None:
            super().create(key, data)
            self.delete("blobs/a")

    objects = Objects(Collected(MemoryStore()))
    assert objects.publish(BLOBS, RECORD)
    assert objects.get("blobs/a") == b"1"


def filled(folder: Path) -> MemoryStore:
    """A store where `legal` has two versions."""
    store = MemoryStore()
    registry = restarted(Objects(Bucket(store)))
    for seed in (1, 2):
        registry.add("legal", *write(folder / str(seed), factors(seed)), replace=True)
    return store


def history(registry: AdapterRegistry) -> list[tuple[str, int, str]]:
    registry.refresh()
    found = []
    for name in ("legal", "new"):
        try:
            found += [(name, info.version, info.digest) for info in registry.versions(name)]
        except AdapterNotFound:
            continue
    return found


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@BEFORE_AFTER
def test_every_request_of_a_change_may_fail(tmp_path: Path, change: Change, after: bool) -> None:
    """Whichever request fails: the change is made once, or not at all; said again, it is made once."""
    store = filled(tmp_path)
    counting = FaultyBucket(store)
    registry = restarted(Objects(counting))
    before, start = history(registry), len(counting.names)
    change(registry, tmp_path / "files")
    wanted, total = history(restarted(Objects(Bucket(store)))), len(counting.names) - start
    assert total >= 2
    for at in range(1, total + 1):
        store = filled(tmp_path)
        bucket = FaultyBucket(store)
        registry = AdapterRegistry(Log(Objects(bucket)), BASE)
        bucket.at = bucket.until = len(bucket.names) + at
        bucket.after = after
        try:
            change(registry, tmp_path / "files")
        except OutcomeUnknown:
            pass
        except StoreUnavailable:
            assert history(restarted(Objects(Bucket(store)))) == before
        else:
            assert history(restarted(Objects(Bucket(store)))) == wanted
        try:
            change(registry, tmp_path / "files")
        except AdapterNotFound:
            assert change is CHANGES["delete"]
        again = restarted(Objects(Bucket(store)))
        assert history(again) == wanted
        assert again.verify() == frozenset()


@pytest.mark.parametrize("latency", [0.0, 0.01])
def test_racing_writers_on_a_slow_bucket(tmp_path: Path, latency: float) -> None:
    store = MemoryStore()

    def replace(number: int) -> object:
        bucket = FaultyBucket(store, at=4 + number, after=bool(number % 2))
        bucket.latency = latency
        registry = AdapterRegistry(Log(Objects(bucket)), BASE)
        return registry.add("legal", *write(tmp_path / str(number), factors(number)), replace=True)[0].version

    outcomes = race(6, replace)
    final = restarted(Objects(Bucket(store)))
    versions = [info.version for info in reversed(final.versions("legal"))]
    told = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert versions == list(range(1, len(versions) + 1))
    assert len(set(told)) == len(told)
    assert set(told) <= set(versions)
    assert final.verify() == frozenset()
