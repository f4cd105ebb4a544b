"""fsck finds every kind of damage on every backend; collection takes what belongs to no version, and only that."""

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from adapters_store.errors import AdapterCorrupt
from adapters_store.fsck import check
from adapters_store.local import LocalObjects
from adapters_store.log import Log
from adapters_store.objects import Objects
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import BASE, Upload, factors, race, write

Damage = Callable[[Objects, str], None]
LATER = datetime.now(UTC) + timedelta(days=1)
ORPHANS = {f"blobs/sha256/{'0' * 64}": b"x", f"manifests/sha256/{'0' * 64}.json": b"{}"}


def flip(objects: Objects, key: str) -> None:
    data = objects.get(key)
    objects.publish({key: data[:-1] + bytes([data[-1] ^ 1])})


def cut(objects: Objects, key: str) -> None:
    objects.publish({key: objects.get(key)[:-1]})


def remove(objects: Objects, key: str) -> None:
    objects._bucket.delete(key)


def test_a_sound_store(objects: Objects, registry: AdapterRegistry, upload: Upload) -> None:
    upload("legal", 1)
    upload("legal", 2, replace=True)
    upload("twin", 2)
    registry.delete("twin")
    objects.publish(ORPHANS)
    told: list[tuple[int, int | None]] = []
    report = check(Log(objects), lambda done, total: told.append((done, total)))
    assert (report.versions, report.files, report.unreferenced, report.problems) == (4, 5, 2, [])
    assert told[-1] == (report.bytes, report.bytes)
    assert report.bytes == sum(Log(objects).sizes().values()) - 3


@pytest.mark.parametrize(
    ("prefix", "damage", "code"),
    [
        ("blobs/", flip, "blob_damaged"),
        ("blobs/", cut, "blob_damaged"),
        ("blobs/", remove, "blob_missing"),
        ("manifests/", flip, "manifest_damaged"),
        ("manifests/", remove, "manifest_missing"),
        ("names/public/legal/1", flip, "record_damaged"),
        ("names/public/legal/1", remove, "version_gap"),
    ],
)
def test_every_damage_is_found_once(objects: Objects, upload: Upload, prefix: str, damage: Damage, code: str) -> None:
    upload("legal", 1)
    upload("legal", 2, replace=True)
    upload("legal", 1, replace=True)
    key = next(key for key in sorted(objects.sizes("")) if key.startswith(prefix))
    damage(objects, key)
    problems = check(Log(objects)).problems
    assert [problem.code for problem in problems] == [code]
    assert problems[0].where.startswith("public/legal@")


def test_only_old_files_of_no_version_are_collected(
    objects: Objects, registry: AdapterRegistry, upload: Upload
) -> None:
    for seed in (1, 2):
        upload("legal", seed, replace=True)
    registry.delete("legal")
    objects.publish(ORPHANS)
    log = Log(objects)
    assert log.unreferenced(before=datetime.now(UTC) - timedelta(hours=1)) == {}
    found = log.unreferenced(before=LATER)
    assert found.keys() == ORPHANS.keys()
    assert all(log.discard(key, item) for key, item in found.items())
    assert not any(log.discard(key, item) for key, item in found.items())
    assert log.unreferenced(before=LATER) == {}
    registry.rollback("legal", 1)  # nothing that a version had is gone
    assert check(log).problems == []


def age(store: Path) -> datetime:
    """Makes all files two hours old; returns the time an hour ago."""
    now = datetime.now(UTC)
    for path in store.rglob("*"):
        os.utime(path, ((now - timedelta(hours=2)).timestamp(),) * 2)
    return now - timedelta(hours=1)


def test_what_an_upload_writes_again_is_spared(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path)
    objects.publish(ORPHANS)
    log = Log(objects)
    found = log.unreferenced(before=age(tmp_path))
    assert found.keys() == ORPHANS.keys()
    objects.publish(ORPHANS)
    assert not any(log.discard(key, item) for key, item in found.items())
    assert {key for key in objects.sizes("") if key != "lock"} == ORPHANS.keys()


def test_nothing_is_collected_while_a_record_cannot_be_read(objects: Objects, upload: Upload) -> None:
    upload("legal", 1)
    flip(objects, "names/public/legal/1.json")
    with pytest.raises(AdapterCorrupt, match="polyrank fsck"):
        Log(objects).unreferenced(before=LATER)


def test_collectors_beside_uploads(tmp_path: Path) -> None:
    """Uploads of what an earlier, failed one had left, while others collect it: no version lacks a file."""
    for attempt in range(5):
        store = tmp_path / str(attempt)
        registry = AdapterRegistry(Log(LocalObjects(store)), BASE)
        for number in range(4):
            registry.add(f"a{number}", *write(tmp_path / str(number), factors(number)))
        for record in (store / "names").rglob("*.json"):
            record.unlink()

        before = age(store)

        def work(number: int, store: Path = store, before: datetime = before) -> None:
            log = Log(LocalObjects(store))
            if number % 2:
                for key, item in log.unreferenced(before).items():
                    log.discard(key, item)
                return
            files = write(tmp_path / f"up{number}", factors(number // 2))
            AdapterRegistry(log, BASE).add(f"a{number // 2}", *files)

        assert race(8, work) == [None] * 8
        report = check(Log(LocalObjects(store)))
        assert (report.versions, report.problems) == (4, [])
