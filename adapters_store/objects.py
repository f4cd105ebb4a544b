"""Objects by key on any store that obstore reaches: memory, S3, GCS, Azure. Synchronous and thread-safe.

`publish` is the one way to write: the objects first, then one record under a key that must be new. The record is the
commit point and the compare-and-swap.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import MemoryStore, from_url

from adapters_store.canonical import CHUNK
from adapters_store.errors import StoreUnavailable, write_error
from adapters_store.staging import staged_file, sweep, temporary_folder

Source = Path | bytes
# Left alone, obstore tries for three minutes; whoever asked has gone by then. No `client_options` here: they would
# replace what the environment says of them (AWS_ALLOW_HTTP, proxies), and its time-outs, 5 s and 30 s, are right.
_RETRY: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}


class ObjectMissing(KeyError):
    """There is no object under this key."""


@contextmanager
def _reading(key: str) -> Iterator[None]:
    """obstore's errors as ours; they name hosts and paths, which no answer may."""
    try:
        yield
    except (NotFoundError, FileNotFoundError):
        raise ObjectMissing(key) from None
    except BaseError as error:
        raise StoreUnavailable("The adapter store cannot be reached; try again.") from error


class Objects:
    """shared: other processes may write to this store, so a failed publish must not delete what it wrote.

    staging: folder for files in flight, uploads too.
    """

    def __init__(self, store: Any, *, shared: bool = True, staging: Path | None = None) -> None:
        self.staging = staging or temporary_folder()
        self._store = store
        self._lock: AbstractContextManager[Any] = nullcontext() if shared else threading.Lock()
        self._shared = shared

    def get(self, key: str) -> bytes:
        """An object's bytes. Raises ObjectMissing, StoreUnavailable."""
        with _reading(key):
            return bytes(obstore.get(self._store, key).bytes())

    def sizes(self, prefix: str) -> dict[str, int]:
        """Every key below the prefix with its size in bytes: one listing."""
        with _reading(prefix):
            batches = obstore.list(self._store, prefix, chunk_size=1000)
            return {item["path"]: item["size"] for batch in batches for item in batch}

    def exists(self, key: str) -> bool:
        try:
            with _reading(key):
                obstore.head(self._store, key)
        except ObjectMissing:
            return False
        return True

    @contextmanager
    def file(self, key: str) -> Iterator[Path]:
        """The object as a local file, for as long as the context lasts. Raises ObjectMissing, StoreUnavailable."""
        with staged_file(self.staging) as path:
            with _reading(key), path.open("wb") as copy:
                for block in obstore.get(self._store, key).stream(min_chunk_size=CHUNK):
                    copy.write(block)
            yield path

    def publish(self, objects: Mapping[str, Source], record: tuple[str, bytes] | None = None) -> bool:
        """Writes the objects, then the record; False if its key was taken, with nothing of ours left.

        Raises StorageFull or StoreUnavailable when the store refuses, again with nothing left; objects of a shared
        remote store stay, for another writer may rely on them: they are unreferenced, and collected later.
        """
        with self._exclusive():
            before = frozenset(key for key in objects if self.exists(key))
            done = False
            try:
                for key, source in objects.items():
                    self._put(key, source)
                done = record is None or self._create(*record)
            except (OSError, BaseError) as error:
                raise write_error(error) from error
            finally:
                if not done and not self._shared:
                    self._undo([key for key in objects if key not in before])
        return done

    def sweep(self) -> None:
        """Removes what interrupted writers left."""
        sweep(self.staging)

    def _exclusive(self) -> AbstractContextManager[Any]:
        return self._lock

    def _put(self, key: str, source: Source) -> None:
        obstore.put(self._store, key, source)

    def _create(self, key: str, data: bytes) -> bool:
        try:
            obstore.put(self._store, key, data, mode="create")
        except (AlreadyExistsError, FileExistsError):
            return self.get(key) == data  # a retried request finds its own first attempt
        return True

    def _undo(self, keys: list[str]) -> None:
        for key in keys:
            if self.exists(key):
                obstore.delete(self._store, key)


def open_objects(url: str) -> Objects:
    """`memory://`, a folder (path or `file://`), or `s3://`, `gs://`, `az://` with credentials from the environment."""
    from adapters_store.local import LocalObjects

    if url.startswith("memory:"):
        return Objects(MemoryStore(), shared=False)
    if "://" not in url or url.startswith("file://"):
        return LocalObjects(Path(url.removeprefix("file://")))
    return Objects(from_url(url, retry_config=_RETRY))
