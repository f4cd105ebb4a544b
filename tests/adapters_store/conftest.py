"""Shared by all tests of the store."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapters_store.info import AdapterInfo
from adapters_store.log import Log
from adapters_store.objects import Objects
from adapters_store.places import open_objects
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.s3 import S3, serving
from tests.adapters_store.support import BASE, Upload, factors, write


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The models here are so small that waking a second thread costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    with serving() as server:
        yield server


@pytest.fixture(params=["memory", "local", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "s3":
        server: S3 = request.getfixturevalue("s3")
        return server.open()
    return open_objects("memory://" if request.param == "memory" else str(tmp_path / "store"))


@pytest.fixture
def registry(objects: Objects) -> AdapterRegistry:
    return AdapterRegistry(Log(objects), BASE)


@pytest.fixture
def upload(registry: AdapterRegistry, tmp_path: Path) -> Upload:
    """`upload(name, seed, **options)` adds the adapter of that seed."""

    def add(name: str, seed: int, **options: object) -> tuple[AdapterInfo, bool]:
        target: AdapterRegistry = options.pop("to", registry)  # type: ignore[assignment]
        return target.add(name, *write(tmp_path / str(seed), factors(seed)), **options)  # type: ignore[arg-type]

    return add
