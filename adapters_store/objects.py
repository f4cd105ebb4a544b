"""Objects by key in memory or in a bucket: S3, GCS, Azure. Synchronous and thread-safe.

`publish` is the one way to write: the objects first, then one record under a key that must be new. The record is the
commit point and the compare-and-swap.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from adapters_store import canonical
from adapters_store.bucket import Bucket, ObjectDamaged, ObjectExists, ObjectMissing, Source, Stored
from adapters_store.errors import OutcomeUnknown, StoreUnavailable, write_error
from adapters_store.histogram import Histogram
from adapters_store.staging import staged_file, sweep, temporary_folder

_ATTEMPTS = 3  # to write a record; obstore repeats a request that the store refused, not one whose answer was lost
_MARK = "store.json"
FETCH_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds of a download


class Objects:
    """shared: other processes may write to this store, so a failed publish must not delete what it wrote.

    staging: folder for files in flight, uploads too.
    """

    def __init__(self, bucket: Bucket, *, shared: bool = True, staging: Path | None = None) -> None:
        self.staging = staging or temporary_folder()
        self._bucket = bucket
        self._lock: AbstractContextManager[Any] = nullcontext() if shared else threading.Lock()
        self._shared = shared
        self.fetch_seconds = Histogram(FETCH_BOUNDS)
        self._downloads: dict[str, Path] = {}  # of several of one object the last that began

    def prove(self) -> None:
        """Raises StoreUnavailable unless the store can be listed and written, and keeps a record that is there.

        Without the last, two servers would overwrite each other's versions: not every S3 look-alike does it.
        """
        self._bucket.list(_MARK)
        for _ in range(2):
            try:
                self._bucket.create(_MARK, b'{"schema":1}')
            except ObjectExists:
                return
        text = "The adapter store overwrites objects that must be written once: it does not know `If-None-Match`."
        raise StoreUnavailable(text, code="store_unsuitable")

    def get(self, key: str) -> bytes:
        """An object's bytes. Raises ObjectMissing, StoreUnavailable."""
        return self._bucket.get(key)

    def listing(self, prefix: str) -> dict[str, Stored]:
        """Every object below the prefix: one listing."""
        return self._bucket.list(prefix)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Every key below the prefix with its size in bytes: one listing."""
        return {key: item.size for key, item in self.listing(prefix).items()}

    def exists(self, key: str) -> bool:
        try:
            self._bucket.head(key)
        except ObjectMissing:
            return False
        return True

    def bytes_here(self, key: str, digest: str, size: int) -> int:
        """Of an object's `size` bytes those on this machine's disk; while it is downloaded, those that have come."""
        path = self._downloads.get(key)
        try:
            return min(size, path.stat().st_size) if path is not None else 0
        except FileNotFoundError:  # it has ended meanwhile
            return 0

    @contextmanager
    def file(self, key: str) -> Iterator[Path]:
        """The object as a local file, for as long as the context lasts. Raises ObjectMissing, StoreUnavailable."""
        with staged_file(self.staging) as path:
            self._downloads[key] = path
            try:
                started = time.monotonic()
                self._bucket.download(key, path)
                self.fetch_seconds.observe(time.monotonic() - started)
                yield path
            finally:
                self._downloads.pop(key, None)

    @contextmanager
    def content(self, key: str, digest: str, size: int | None = None) -> Iterator[Path]:
        """The object as a local file that has this digest, and this size in bytes where one is given.

        Raises ObjectDamaged, ObjectMissing, StoreUnavailable, and OSError for a local disk.
        """
        with self.file(key) as path:
            check_content(path, digest, size)
            yield path

    def publish(self, objects: Mapping[str, Source], record: tuple[str, bytes] | None = None) -> bool:
        """Writes the objects, then the record; False if its key was taken, with nothing of ours left.

        Raises StorageFull or StoreUnavailable when the store refuses, again with nothing left; objects of a shared
        remote store stay, for another writer may rely on them: they are unreferenced, and collected later. Raises
        OutcomeUnknown if the record may have been written though no attempt was answered.
        """
        with self._exclusive():
            undo = [] if self._shared else [key for key in objects if not self.exists(key)]
            try:
                for key, source in objects.items():
                    self._put(key, source)
                done = record is None or self._create(*record)
            except OutcomeUnknown:
                raise  # the record may be there and needs its objects
            except OSError as error:
                self._undo(undo)
                raise write_error(error) from error
            except BaseException:
                self._undo(undo)
                raise
            if not done:
                self._undo(undo)
            elif self._shared:
                self._confirm(objects)
        return done

    def discard(self, key: str, seen: Stored) -> bool:
        """Removes an object; False, and nothing happens, if it is no longer the one of that listing.

        Every publish writes its objects anew before its record, which shows in their time. In a folder nothing comes
        between the question and the removal; what does in a bucket, `_confirm` mends.
        """
        with self._exclusive(), suppress(ObjectMissing):
            if self._bucket.head(key) == seen:
                self._bucket.delete(key)
                return True
        return False

    def sweep(self) -> None:
        """Removes what interrupted writers left."""
        sweep(self.staging)

    def _exclusive(self) -> AbstractContextManager[Any]:
        return self._lock

    def _put(self, key: str, source: Source) -> None:
        try:
            self._bucket.put(key, source)
        except ObjectMissing:  # only the source can be missing here
            raise StoreUnavailable("A file of the upload has gone. Nothing was changed; try again.") from None

    def _create(self, key: str, data: bytes) -> bool:
        """Whether the record is ours. An attempt whose answer was lost may have written it: its bytes, which no other
        writer's equal, tell.
        """
        lost: list[Exception] = []
        for _ in range(_ATTEMPTS):
            try:
                with suppress(ObjectExists):
                    self._bucket.create(key, data)
                    return True
                return self._bucket.get(key) == data
            except StoreUnavailable as error:
                if error.refused and not lost:
                    raise
                lost.append(error)
        raise OutcomeUnknown from lost[-1]

    def _confirm(self, objects: Mapping[str, Source]) -> None:
        """Writes again what a collector, which had found it unreferenced, removed before the record was there."""
        try:
            for key, source in objects.items():
                if not self.exists(key):
                    self._put(key, source)
        except StoreUnavailable as error:
            raise OutcomeUnknown from error

    def _undo(self, keys: list[str]) -> None:
        for key in keys:
            with suppress(ObjectMissing):
                self._bucket.delete(key)


def check_content(path: Path, digest: str, size: int | None) -> None:
    """Raises ObjectDamaged if the file has another digest or size."""
    if (size is not None and path.stat().st_size != size) or canonical.digest_file(path) != digest:
        raise ObjectDamaged(digest)
