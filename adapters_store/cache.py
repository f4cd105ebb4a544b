"""Files of a bucket on a local disk, found by their digest. Several processes may share the folder.

    sha256/<digest>  a file as it is in the bucket; may vanish at any time, or rot, so each use verifies it
    staging/         downloads in flight, and one link for each use, so that its file outlives its eviction

The cache is never the truth: what fails here is fetched again.
"""

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from adapters_store.bucket import Bucket, ObjectDamaged
from adapters_store.objects import Objects, check_content
from adapters_store.staging import make_folder


@dataclass(frozen=True, slots=True)
class CachePlace:
    """A folder for the cache, and how many bytes may stay in it beside those in use."""

    folder: Path
    limit: int


class CachedObjects(Objects):
    """A bucket whose files are kept on a local disk; the one that was used longest ago goes first."""

    def __init__(self, bucket: Bucket, place: CachePlace) -> None:
        super().__init__(bucket, staging=place.folder / "staging")
        self._limit = place.limit
        self._folder = place.folder / "sha256"
        make_folder(self._folder)

    def bytes_here(self, key: str, digest: str, size: int) -> int:
        return size if (self._folder / digest).exists() else super().bytes_here(key, digest, size)

    @contextmanager
    def content(self, key: str, digest: str, size: int | None = None) -> Iterator[Path]:
        with ExitStack() as stack:
            path = stack.enter_context(self._borrowed(digest))
            if path is None or not self._is_sound(path, digest, size):
                self._make_room(size or 0)
                path = stack.enter_context(super().content(key, digest, size))
                self._keep(path, digest)
            yield path

    @contextmanager
    def _borrowed(self, digest: str) -> Iterator[Path | None]:
        """A link of our own to a kept file, or None. Its lock keeps a sweep away."""
        link = self.staging / uuid.uuid4().hex
        with ExitStack() as stack:
            found = False
            with suppress(OSError):
                stack.callback(link.unlink, missing_ok=True)
                link.hardlink_to(self._folder / digest)
                file = stack.enter_context(link.open("rb"))
                fcntl.flock(file, fcntl.LOCK_SH)
                found = link.exists()  # else a sweep came before the lock
            yield link if found else None

    def _is_sound(self, path: Path, digest: str, size: int | None) -> bool:
        kept = self._folder / digest
        try:
            check_content(path, digest, size)
        except (ObjectDamaged, OSError):
            with suppress(OSError):
                kept.unlink()
            return False
        with suppress(FileNotFoundError):  # evicted meanwhile
            os.utime(kept)
        return True

    def _keep(self, path: Path, digest: str) -> None:
        """The file is whole and verified, so one link makes it appear at once. A crash may cut it: see `_is_sound`."""
        with suppress(OSError):
            (self._folder / digest).hardlink_to(path)
        with suppress(OSError):
            self._evict(lambda kept: kept - self._limit)

    def _make_room(self, size: int) -> None:
        """For a download, where the disk is smaller than the limit says."""
        with suppress(OSError):
            lacking = size - shutil.disk_usage(self._folder).free
            if lacking > 0:
                self._evict(lambda _: lacking)

    def _evict(self, excess_of: Callable[[int], int]) -> None:
        """Removes what was used longest ago until as many bytes are gone as `excess_of` says of the bytes kept."""
        files = []
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):  # by another process
                files.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
        excess = excess_of(sum(size for _, size, _ in files))
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
