"""Every call of every change on a disk that is full or failing: 507, nothing changed, and the next try succeeds."""

import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from adapters_store.compression.recipe import Recipe, compress
from adapters_store.errors import StorageFull
from adapters_store.fsck import check
from adapters_store.local import LocalObjects
from adapters_store.log import Log
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import BASE, factors, store_files, write
from tests.adapters_store.test_local import FailingDisk, folders
from tests.adapters_store.test_registry_forms import TOLD

Change = Callable[[AdapterRegistry, Path], object]


def _compress(registry: AdapterRegistry, _: Path) -> object:
    made = compress(registry.load(registry.resolve("legal").digest), Recipe())
    return registry.add_forms("legal", made.modules, "compress", TOLD, replace=True)


CHANGES: Mapping[str, Change] = {
    "upload": lambda registry, files: registry.add("new", *write(files, factors(3))),
    "replace": lambda registry, files: registry.add("legal", *write(files, factors(3)), replace=True),
    "delete": lambda registry, _: registry.delete("legal"),
    "rollback": lambda registry, _: registry.rollback("legal", 1),
    "compress": _compress,
}
LEAST_CALLS = {"upload": 20, "replace": 15, "delete": 6, "rollback": 9, "compress": 12}


def opened(folder: Path, disk: FailingDisk) -> AdapterRegistry:
    return AdapterRegistry(Log(LocalObjects(folder, disk)), BASE)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    registry = opened(tmp_path / "prepared", FailingDisk())
    for seed in (1, 2):
        registry.add("legal", *write(tmp_path / "files", factors(seed)), replace=True)
    return tmp_path / "prepared"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "failing"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_refused_change_is_507_and_leaves_nothing(
    tmp_path: Path, prepared: Path, name: str, after: bool, number: int
) -> None:
    change, files = CHANGES[name], tmp_path / "files"
    whole = FailingDisk()
    shutil.copytree(prepared, tmp_path / "whole")
    change(opened(tmp_path / "whole", whole), files)
    assert whole.calls >= LEAST_CALLS[name]
    for at in range(1, whole.calls + 1):
        folder = tmp_path / str(at)
        shutil.copytree(prepared, folder)
        registry = opened(folder, FailingDisk(at, number, after=after))
        before = store_files(folder), folders(folder), registry.versions("legal")
        with pytest.raises(StorageFull) as caught:
            change(registry, files)
        assert (caught.value.status, caught.value.code) == (507, "storage_full")
        assert ("full" in caught.value.message) == (number == errno.ENOSPC)
        assert "Nothing was changed" in caught.value.message
        assert (store_files(folder), folders(folder), registry.versions("legal")) == before, f"call {at}"
        change(registry, files)
        assert check(Log(LocalObjects(folder))).problems == []
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", CHANGES)
def test_another_failure_is_503_and_leaves_nothing(tmp_path: Path, prepared: Path, name: str) -> None:
    """Too few descriptors, say: the client may try again."""
    registry = opened(prepared, FailingDisk(1, errno.EMFILE))
    before = store_files(prepared), registry.versions("legal")
    with pytest.raises(Exception, match="try again") as caught:
        CHANGES[name](registry, tmp_path / "files")
    assert getattr(caught.value, "status", None) == 503
    assert (store_files(prepared), registry.versions("legal")) == before
