"""The requests to an object store that obstore reaches, and what went wrong with one, in words of ours."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError

from adapters_store.canonical import CHUNK
from adapters_store.errors import StorageFull, StoreUnavailable, write_error

Source = Path | bytes
# obstore tells statuses and the store's own codes in its text only.
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified bucket does not exist")
_DENIED = re.compile(r"status code: 40[13]\b|/latest/api/token|metadata\.google\.internal|oauth2/token")
_FULL = re.compile(r"No space left|status code: 507\b")


class ObjectMissing(KeyError):
    """There is no object under this key."""


class ObjectExists(KeyError):
    """There is an object under this key already."""


class ObjectDamaged(ValueError):
    """An object has not the digest or the size that it should have."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object of a listing: its size in bytes, and when it was written last."""

    size: int
    modified: datetime


class Bucket:
    """One method for each request: tests delay them and fail them one by one.

    Raise ObjectMissing, ObjectExists, StoreUnavailable, StorageFull; OSError for a local source or target.
    """

    def __init__(self, store: Any) -> None:
        self.store = store

    def get(self, key: str) -> bytes:
        with _answered(key):
            return bytes(obstore.get(self.store, key).bytes())

    def download(self, key: str, target: Path) -> None:
        with _answered(key), target.open("wb") as copy:
            for block in obstore.get(self.store, key).stream(min_chunk_size=CHUNK):
                copy.write(block)

    def head(self, key: str) -> Stored:
        with _answered(key):
            meta = obstore.head(self.store, key)
        return _stored(meta)

    def list(self, prefix: str) -> dict[str, Stored]:
        """Every key below the prefix."""
        with _answered(prefix):
            batches = obstore.list(self.store, prefix, chunk_size=1000)
            return {item["path"]: _stored(item) for batch in batches for item in batch}

    def put(self, key: str, source: Source) -> None:
        """Writes an object, in place of one that may be there."""
        with _answered(key):
            obstore.put(self.store, key, source)

    def create(self, key: str, data: bytes) -> None:
        """Writes an object where none is."""
        with _answered(key):
            obstore.put(self.store, key, data, mode="create")

    def delete(self, key: str) -> None:
        with _answered(key):
            obstore.delete(self.store, key)


def _stored(meta: Mapping[str, Any]) -> Stored:
    """In whole seconds: some stores list an object with milliseconds and head it without."""
    return Stored(meta["size"], meta["last_modified"].replace(microsecond=0))


@contextmanager
def _answered(key: str) -> Iterator[None]:
    """obstore's errors as ours; they name hosts and paths, which no answer may."""
    try:
        yield
    except (AlreadyExistsError, FileExistsError):
        raise ObjectExists(key) from None
    except (NotFoundError, FileNotFoundError) as error:
        if _NO_BUCKET.search(str(error)):
            raise _unavailable(error) from error
        raise ObjectMissing(key) from None
    except BaseError as error:
        raise _unavailable(error) from error


def _unavailable(error: Exception) -> StorageFull | StoreUnavailable:
    text = str(error)
    if _NO_BUCKET.search(text):
        return StoreUnavailable("The bucket of the adapter store does not exist.", code="store_not_found")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _DENIED.search(text):
        return StoreUnavailable("The adapter store refuses this server's credentials.", code="store_denied")
    if _FULL.search(text):
        return write_error(OSError("No space left"))
    return StoreUnavailable("The adapter store cannot be reached; try again.")
