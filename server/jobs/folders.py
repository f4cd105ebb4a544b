"""A folder for each job's files, removed at its end; those of dead processes are swept."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters_store.staging import make_folder

_LOCK = "lock"


@contextmanager
def job_folder(room: Path) -> Iterator[Path]:
    """A new folder below `room`, locked while it is in use. Raises OSError."""
    make_folder(room)
    folder = Path(tempfile.mkdtemp(dir=room))
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def sweep(room: Path) -> None:
    """Removes the folders whose processes have died; several servers may share the room."""
    make_folder(room)
    for folder in room.iterdir():
        # Blocked: its process lives. Not found: it has just ended, or just begun.
        with suppress(BlockingIOError, FileNotFoundError, NotADirectoryError), (folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
