"""Thousands of adapters in a folder: what a start, a listing and a look-up take. Prints figures, asserts none."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapters_store import canonical
from adapters_store.local import LocalObjects
from adapters_store.log import Log, open_store
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import BASE
from tests.adapters_store.test_local import FailingDisk
from tests.adapters_store.test_records import MANIFEST


def fill(store: Path, count: int) -> None:
    """Adapters of one config and different weights, not synced: it is not the upload that is measured."""
    log = Log(LocalObjects(store, FailingDisk()))
    config = b"config"
    for number in range(count):
        weights = str(number).encode()
        files = {canonical.digest(content): content for content in (config, weights)}
        blobs = {
            name: {"digest": digest, "size": len(content)}
            for name, (digest, content) in zip(("config", "weights"), files.items(), strict=True)
        }
        assert log.commit("public", f"adapter-{number:05}", 1, "upload", {**MANIFEST, "blobs": blobs}, files)
        if (number + 1) % 1000 == 0:
            print(f"{number + 1} of {count} adapters written", flush=True)


@contextmanager
def timed(what: str, times: int = 1) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds = (time.perf_counter() - start) / times
    print(f"{what}: {seconds * 1000:.1f} ms" if seconds > 1e-4 else f"{what}: {seconds * 1e6:.1f} us", flush=True)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.deep)])
def test_thousands_of_adapters(tmp_path: Path, count: int) -> None:
    with timed(f"writing {count} adapters"):
        fill(tmp_path, count)
    with timed("start: the store opened, the log read, all files found"):
        registry = AdapterRegistry(open_store(str(tmp_path)), BASE)
    with timed("listing, a page of 100"):
        page, cursor = registry.list(limit=100)
    with timed("listing, all in one page"):
        infos, end = registry.list(limit=count)
    with timed("a name resolved", count):
        for info in infos:
            registry.resolve(info.name)
    with timed("a digest resolved", count):
        for info in infos:
            registry.resolve(f"sha256:{info.digest}")
    assert (len(page), cursor, end) == (100, "adapter-00099", None)
    assert [info.name for info in infos] == [f"adapter-{number:05}" for number in range(count)]
    assert not any(notice.code == "adapter_corrupt" for info in infos for notice in info.warnings)
