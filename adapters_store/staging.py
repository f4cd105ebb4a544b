"""Files in flight, below a folder that several processes may share.

A writer holds a lock on its file for as long as it lives, so that `sweep` takes only what the dead have left.
"""

import errno
import fcntl
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def staged_file(folder: Path) -> Iterator[Path]:
    """A new empty file, removed at the end. The folder is made if it is gone: something may clean up after us."""
    path, descriptor = _create(folder)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Removes the files whose writers have died; makes the folder."""
    make_folder(folder)
    for path in folder.iterdir():
        # Blocked: its writer lives. Not found: its writer has just finished.
        with suppress(BlockingIOError, FileNotFoundError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def make_folder(folder: Path) -> None:
    """Makes the folder. Raises PermissionError if a stranger made it first where anyone may, as in /tmp."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.parent.stat().st_mode & stat.S_ISVTX and folder.lstat().st_uid != os.getuid():
        raise PermissionError(errno.EACCES, "the staging folder belongs to another user")


def temporary_folder() -> Path:
    """For stores that are no folder: one per user, so that a restarted server finds what its predecessor left."""
    return Path(tempfile.gettempdir()) / f"polyrank-{os.getuid()}"


def _create(folder: Path) -> tuple[Path, int]:
    while True:
        make_folder(folder)
        path = folder / uuid.uuid4().hex
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # shared, for links to the file have readers of their own
            if os.fstat(descriptor).st_nlink:
                return path, descriptor
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)  # a sweep came between creating and locking
