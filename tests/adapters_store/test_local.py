"""The folder store: every failing system call, leftovers of dead writers, keys that climb."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapters_store.errors import StorageFull
from adapters_store.local import Disk, LocalObjects
from tests.adapters_store.support import store_files

RECORD = ("names/t/n/1.json", b"one")
OBJECTS = {"blobs/sha256/a": b"1", "manifests/sha256/b.json": b"2"}


class FailingDisk(Disk):
    """Counts the calls that change the disk and fails the one numbered `at`, before or after it took effect."""

    def __init__(self, at: int = 0, number: int = errno.EIO, *, after: bool = False) -> None:
        self.calls, self.at, self.number, self.after = 0, at, number, after
        self.names: list[str] = []

    def _call(self, name: str, *arguments: object) -> object:
        self.calls += 1
        self.names.append(name)
        hit = self.calls == self.at
        skipped = name == "sync" or (hit and not self.after)
        result = None if skipped else getattr(Disk, name)(self, *arguments)
        if hit:
            if name == "create" and result is not None:
                os.close(result)
            raise OSError(self.number, os.strerror(self.number))
        return result

    def create(self, path: Path) -> int:
        return int(str(self._call("create", path)))

    def write(self, descriptor: int, data: bytes) -> None:
        self._call("write", descriptor, data)

    def sync(self, descriptor: int) -> None:
        self._call("sync", None)  # counted only: what a sync does shows in a power cut, not here

    def mkdir(self, path: Path) -> None:
        self._call("mkdir", path)

    def replace(self, source: Path, target: Path) -> None:
        self._call("replace", source, target)

    def link(self, source: Path, target: Path) -> None:
        self._call("link", source, target)


def calls_of_a_publish(root: Path) -> int:
    disk = FailingDisk()
    assert LocalObjects(root, disk).publish(OBJECTS, RECORD)
    return disk.calls


def folders(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_every_failing_call_is_507_and_leaves_nothing(tmp_path: Path, number: int, after: bool) -> None:
    total = calls_of_a_publish(tmp_path / "whole")
    assert total > 15
    for at in range(1, total + 1):
        root = tmp_path / str(at)
        disk = FailingDisk(at, number, after=after)
        objects = LocalObjects(root, disk)
        with pytest.raises(StorageFull):
            objects.publish(OBJECTS, RECORD)
        assert store_files(root) == []
        assert folders(root) == ["staging"]
        assert objects.publish(OBJECTS, RECORD)  # the store works on


def test_a_failure_hurts_nothing_that_was_there(tmp_path: Path) -> None:
    total = calls_of_a_publish(tmp_path / "whole")
    for at in range(1, total + 1):
        root = tmp_path / str(at)
        LocalObjects(root).publish({"blobs/sha256/a": b"1"}, ("names/t/other/1.json", b"0"))
        before = store_files(root), folders(root)
        disk = FailingDisk(at)
        try:
            LocalObjects(root, disk).publish(OBJECTS, RECORD)
        except StorageFull:
            assert (store_files(root), folders(root)) == before
            assert (root / "blobs/sha256/a").read_bytes() == b"1"
        else:
            assert disk.calls < at  # fewer folders to make this time


def test_data_is_synced_before_it_is_named_and_the_record_last(tmp_path: Path) -> None:
    LocalObjects(tmp_path).publish(OBJECTS, RECORD)  # makes the folders
    disk = FailingDisk()
    LocalObjects(tmp_path, disk).publish({f"{key}2": b"x" for key in OBJECTS}, ("names/t/n/2.json", b"two"))
    staging = ["create", "write", "sync"] * 3
    moving = ["replace"] * 2 + ["sync"] * 5  # blobs/sha256, manifests/sha256, their parents and the root
    assert disk.names == [*staging, *moving, "link", *["sync"] * 4]  # n, t, names and the root


def test_a_writer_beyond_our_lock_still_wins_the_race(tmp_path: Path) -> None:
    class Raced(Disk):
        def link(self, source: Path, target: Path) -> None:
            target.write_bytes(b"theirs")
            super().link(source, target)

    objects = LocalObjects(tmp_path, Raced())
    assert not objects.publish(OBJECTS, RECORD)
    assert store_files(tmp_path) == [RECORD[0]]
    assert objects.get(RECORD[0]) == b"theirs"


def test_a_sweep_takes_what_a_dead_writer_left(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path)
    (tmp_path / "staging" / "left").write_bytes(b"x")
    objects.sweep()
    assert store_files(tmp_path) == []


def test_a_sweep_spares_a_living_writer(tmp_path: Path) -> None:
    objects, other = LocalObjects(tmp_path), LocalObjects(tmp_path)
    staged = objects._stage(tmp_path / "target", b"x")
    other.sweep()
    assert staged.path.exists()
    staged.discard()
    assert store_files(tmp_path) == []


def test_a_sweep_spares_a_living_process_and_takes_its_remains(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path)
    code = (
        "import sys; from pathlib import Path; from adapters_store.local import LocalObjects\n"
        "root = Path(sys.argv[1]); LocalObjects(root)._stage(root / 'x', b'y'); print('staged', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"staged\n"
        objects.sweep()
        assert len(store_files(tmp_path)) == 1
        writer.kill()
    objects.sweep()
    assert store_files(tmp_path) == []


@pytest.mark.parametrize("key", ["../x", "names/../../x", "/etc/passwd", "a/.."])
def test_keys_stay_below_the_root(tmp_path: Path, key: str) -> None:
    objects = LocalObjects(tmp_path / "store")
    with pytest.raises(ValueError, match="below the root"):
        objects.get(key)
    with pytest.raises(ValueError, match="below the root"):
        objects.publish({key: b"x"})
    assert store_files(tmp_path) == []
