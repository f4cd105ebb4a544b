"""Keys in a JSON file that only its owner may read."""

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from server.access.key import MAX_BYTES, Keyring, KeysInvalid, decode, encode

_WRITABLE_BY_ALL = stat.S_IWOTH


class KeyFile:
    """Several processes may read and change it: a change replaces it whole, under a lock on a file beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Keyring:
        """Raises KeysInvalid."""
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_mode & _WRITABLE_BY_ALL:
                    raise KeysInvalid("everybody on this machine may write to it; `chmod 600` it")
                return decode(file.read(MAX_BYTES + 1))
        except OSError as error:
            raise KeysInvalid((error.strerror or "it cannot be read").lower()) from None

    def stamp(self) -> object:
        """Differs once the file has been changed. Cheap."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def change(self, edit: Callable[[Keyring], Keyring]) -> Keyring:
        """Replaces the keys by what `edit` makes of them; a file that is not there is made. Raises KeysInvalid, OSError
        and what `edit` raises, with nothing changed."""
        with self._locked():
            target = self._path.resolve()  # through a link, which stays
            ring = edit(self.read() if target.exists() else Keyring())
            _replace(target, encode(ring))
        return ring

    @contextmanager
    def _locked(self) -> Iterator[None]:
        target = self._path.resolve()
        descriptor = os.open(target.with_name(f"{target.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Nothing is open between two calls."""


def _replace(target: Path, data: bytes) -> None:
    """Atomic and durable; the new file is the owner's alone from its first byte on."""
    partial = target.with_name(f".{target.name}.new")
    partial.unlink(missing_ok=True)  # left by one who died; the lock is ours
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
