"""Objects in a folder, durable: an acknowledged write survives a crash of the process and of the machine.

A write goes to `staging/` first, is synced there, and only then moved to its key; a record is linked, which fails if
the key is taken, and its folder synced before anyone is told. Writers hold a lock on their staging files, so that
`sweep` takes only what dead writers left, and a lock on the store while they move, so that a failed publish can take
back what it moved without hurting another process. obstore's own LocalStore does not sync, hence this file.
"""

import fcntl
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from obstore.store import LocalStore

from adapters_store.bucket import Bucket, ObjectMissing, Source
from adapters_store.canonical import chunks
from adapters_store.errors import write_error
from adapters_store.objects import Objects
from adapters_store.staging import make_folder


class Disk:
    """The system calls that change the disk, one method each: tests fail them one by one."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def write(self, descriptor: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def replace(self, source: Path, target: Path) -> None:
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        target.hardlink_to(source)


class LocalObjects(Objects):
    """Objects below `root`; several processes may share it."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        root.mkdir(parents=True, exist_ok=True)
        super().__init__(Bucket(LocalStore(root)), staging=root / "staging")
        self._root = root
        self._disk = disk or Disk()
        make_folder(self.staging)
        (root / "lock").touch()
        self._threads = threading.RLock()

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            raise ObjectMissing(key) from None

    @contextmanager
    def file(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        try:
            path.stat()
        except FileNotFoundError:
            raise ObjectMissing(key) from None
        yield path

    def bytes_here(self, key: str, digest: str, size: int) -> int:
        return size if self._path(key).exists() else 0

    def publish(self, objects: Mapping[str, Source], record: tuple[str, bytes] | None = None) -> bool:
        staged: list[_Staged] = []
        try:
            for key, source in {**objects, **dict([record] if record else [])}.items():
                staged.append(self._stage(self._path(key), source))
            with self._exclusive():
                return self._move(staged[: len(objects)], staged[-1] if record else None)
        except OSError as error:
            raise write_error(error) from error
        finally:
            for item in staged:
                item.discard()

    def sweep(self) -> None:
        with self._exclusive():
            super().sweep()

    def _path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/"):
            raise ValueError("a key stays below the root")
        return self._root / key

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._threads:
            descriptor = os.open(self._root / "lock", os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)

    def _stage(self, target: Path, source: Source) -> "_Staged":
        make_folder(self.staging)
        path = self.staging / uuid.uuid4().hex
        with self._exclusive():  # or a sweep might come between creating and locking
            try:
                descriptor = self._disk.create(path)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        item = _Staged(path, descriptor, target)
        try:
            for block in chunks(source):
                self._disk.write(descriptor, block)
            self._disk.sync(descriptor)
        except BaseException:
            item.discard()
            raise
        return item

    def _move(self, objects: list["_Staged"], record: "_Staged | None") -> bool:
        """Each path goes on the list to take back before it is made: a call may fail though it took effect."""
        undo: list[Path] = []
        done = False
        try:
            for item in objects:
                self._make_parents(item.target, undo)
                if not item.target.exists():
                    undo.append(item.target)
                self._disk.replace(item.path, item.target)
            self._sync_folders(objects)
            done = record is None or self._link(record, undo)
        finally:
            if not done:
                _take_back(undo)
        return done

    def _link(self, record: "_Staged", undo: list[Path]) -> bool:
        self._make_parents(record.target, undo)
        if record.target.exists():
            return False
        undo.append(record.target)
        try:
            self._disk.link(record.path, record.target)
        except FileExistsError:  # by a writer that our lock does not reach, on a network file system
            undo.pop()
            return False
        self._sync_folders([record])
        return True

    def _make_parents(self, target: Path, undo: list[Path]) -> None:
        missing = [folder for folder in target.parents if not folder.exists()]
        for folder in reversed(missing):
            undo.append(folder)
            self._disk.mkdir(folder)
            self._sync_folder(folder.parent)

    def _sync_folders(self, items: list["_Staged"]) -> None:
        """Every folder from the items up to the root: a predecessor may have died before it synced a new one."""
        below = len(self._root.parts)
        folders = {folder for item in items for folder in item.target.parents if len(folder.parts) >= below}
        for folder in sorted(folders, reverse=True):
            self._sync_folder(folder)

    def _sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._disk.sync(descriptor)
        finally:
            os.close(descriptor)


class _Staged:
    """A synced file in staging, locked while its writer lives."""

    def __init__(self, path: Path, descriptor: int, target: Path) -> None:
        self.path = path
        self.target = target
        self._descriptor = descriptor

    def discard(self) -> None:
        """Removes the staging name, if it is still there, and lets go of the lock."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        with suppress(OSError):
            os.close(self._descriptor)


def _take_back(created: list[Path]) -> None:
    for path in reversed(created):
        with suppress(OSError):  # the first error is the one to report
            path.rmdir() if path.is_dir() else path.unlink()
