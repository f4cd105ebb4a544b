"""Thousands of adapters in a folder or a bucket: what a start, a listing and a look-up take. Prints figures."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapters_store import canonical
from adapters_store.local import LocalObjects
from adapters_store.log import Log, open_store
from adapters_store.places import open_objects
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.s3 import S3
from tests.adapters_store.support import BASE
from tests.adapters_store.test_local import FailingDisk
from tests.adapters_store.test_records import MANIFEST


def fill(log: Log, count: int) -> None:
    """Adapters of one config and different weights; it is not the upload that is measured."""
    config = b"config"

    def commit(number: int) -> None:
        weights = str(number).encode()
        files = {canonical.digest(content): content for content in (config, weights)}
        blobs = {
            name: {"digest": digest, "size": len(content)}
            for name, (digest, content) in zip(("config", "weights"), files.items(), strict=True)
        }
        assert log.commit("public", f"adapter-{number:05}", 1, "upload", {**MANIFEST, "blobs": blobs}, files)

    with ThreadPoolExecutor(8) as pool:
        for done, _ in enumerate(pool.map(commit, range(count)), 1):
            if done % 1000 == 0:
                print(f"{done} of {count} adapters written", flush=True)


@contextmanager
def timed(what: str, times: int = 1) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds = (time.perf_counter() - start) / times
    print(f"{what}: {seconds * 1000:.1f} ms" if seconds > 1e-4 else f"{what}: {seconds * 1e6:.1f} us", flush=True)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.deep)])
def test_thousands_of_adapters(tmp_path: Path, count: int) -> None:
    with timed(f"writing {count} adapters"):
        fill(Log(LocalObjects(tmp_path, FailingDisk())), count)  # not synced
    use(str(tmp_path), count)


@pytest.mark.parametrize("count", [30, pytest.param(10_000, marks=pytest.mark.deep)])
def test_thousands_of_adapters_in_a_bucket(s3: S3, count: int) -> None:
    """moto answers in this process, one request at a time: its own work is most of what is printed here."""
    url = s3.url()
    with timed(f"writing {count} adapters"):
        fill(Log(open_objects(url)), count)
    use(url, count)


def use(url: str, count: int) -> None:
    with timed("start: the store opened, the log read, all files found"):
        registry = AdapterRegistry(open_store(url), BASE)
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
    assert (len(page), cursor, end) == (min(count, 100), "adapter-00099" if count > 100 else None, None)
    assert [info.name for info in infos] == [f"adapter-{number:05}" for number in range(count)]
    assert not any(notice.code == "adapter_corrupt" for info in infos for notice in info.warnings)
