"""Where a store may be, by its URL, and how to mend what keeps it from being opened."""

from datetime import timedelta
from pathlib import Path
from typing import Any

from obstore.exceptions import BaseError
from obstore.store import MemoryStore, from_url

from adapters_store.bucket import Bucket
from adapters_store.cache import CachedObjects, CachePlace
from adapters_store.canonical import shorten
from adapters_store.errors import StoreUnavailable
from adapters_store.local import LocalObjects
from adapters_store.objects import Objects

# Left alone, obstore tries for three minutes; whoever asked has gone by then. No `client_options` here: they would
# replace what the environment says of them (AWS_ALLOW_HTTP, proxies), and its time-outs, 5 s and 30 s, are right.
_RETRY: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_MEND = {
    "store_not_found": "has no such bucket: create it, or name another with --store.",
    "store_denied": "refuses these credentials, or there are none: set {credentials}; they must let us list, read, "
    "write and delete.",
    "store_unsuitable": "overwrites objects that must be written once (it does not know `If-None-Match`): take a newer "
    "version of it, or another store.",
    "store_unavailable": "does not answer: is the network there, and AWS_ENDPOINT_URL right (an http:// one needs "
    "AWS_ALLOW_HTTP=true)?",
}


def open_objects(url: str, cache: CachePlace | None = None) -> Objects:
    """`memory://`, a folder (path or `file://`), or `s3://`, `gs://`, `az://` with credentials from the environment.

    Raises OSError for a folder, ValueError for a URL that means nothing, StoreUnavailable where credentials lack.
    """
    if url.startswith("memory:"):
        return Objects(Bucket(MemoryStore()), shared=False)
    if not is_remote(url):
        return LocalObjects(Path(url.removeprefix("file://")))
    try:
        bucket = Bucket(from_url(url, retry_config=_RETRY))
    except BaseError as error:
        if "URL" in str(error):
            raise ValueError("no such kind of store") from error
        raise _unusable("store_denied", url) from error
    return Objects(bucket) if cache is None else CachedObjects(bucket, cache)


def is_remote(url: str) -> bool:
    """Whether the store is in a bucket, which many machines may share."""
    return "://" in url and not url.startswith(("file://", "memory:"))


def prove(objects: Objects, url: str) -> None:
    """Tries a bucket out. Raises StoreUnavailable, with a stable code and what to do."""
    try:
        objects.prove()
    except StoreUnavailable as error:
        raise _unusable(error.code, url) from error


def _unusable(code: str, url: str) -> StoreUnavailable:
    mend = _MEND[code].format(credentials=_CREDENTIALS.get(url.partition("://")[0], "the credentials"))
    return StoreUnavailable(f"The adapter store `{shorten(url)}` {mend}", code=code)
