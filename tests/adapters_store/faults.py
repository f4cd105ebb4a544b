"""Buckets that are slow and that fail: any request, before or after it took effect."""

import os
import random
import time
from pathlib import Path
from typing import Any

from adapters_store.bucket import Bucket, Source, Stored
from adapters_store.errors import StoreUnavailable


def no_answer() -> Exception:
    return StoreUnavailable("no answer")


def os_error(number: int) -> Exception:
    return OSError(number, os.strerror(number))


class FaultyBucket(Bucket):
    """Fails requests `at` to `until` (counted from 1), before or after they took effect; all others pass.

    error: makes what is raised; names: the requests so far; latency: longest wait before a request, in seconds.
    """

    def __init__(self, store: Any, at: int = 0, until: int | None = None, *, after: bool = False) -> None:
        super().__init__(store)
        self.at, self.until, self.after = at, until or at, after
        self.error = no_answer
        self.latency = 0.0
        self.names: list[str] = []

    def _request(self, name: str, *arguments: Any) -> Any:
        self.names.append(name)
        if self.latency:
            time.sleep(random.uniform(0, self.latency))
        hit = self.at <= len(self.names) <= self.until
        result = None if hit and not self.after else getattr(Bucket, name)(self, *arguments)
        if hit:
            raise self.error()
        return result

    def get(self, key: str) -> bytes:
        return bytes(self._request("get", key))

    def download(self, key: str, target: Path) -> None:
        self._request("download", key, target)

    def head(self, key: str) -> Stored:
        found: Stored = self._request("head", key)
        return found

    def list(self, prefix: str) -> dict[str, Stored]:
        found: dict[str, Stored] = self._request("list", prefix)
        return found

    def put(self, key: str, source: Source) -> None:
        self._request("put", key, source)

    def create(self, key: str, data: bytes) -> None:
        self._request("create", key, data)

    def delete(self, key: str) -> None:
        self._request("delete", key)
