"""Quotas of tenants: refused before anything is stored, exact where several upload at once, nobody else's concern."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapters_store.candidate import NOT_RUNNING
from adapters_store.compression.recipe import Recipe, compress
from adapters_store.errors import AdapterConflict, AdapterNotFound
from adapters_store.forms import MadeForms
from adapters_store.log import Log, open_store
from adapters_store.objects import Objects
from adapters_store.quota import Quota, QuotaExceeded
from adapters_store.records import Record
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import BASE, Upload, factors, write


@pytest.fixture
def quotas() -> dict[str, Quota]:
    return {}


@pytest.fixture
def registry(objects: Objects, quotas: dict[str, Quota]) -> AdapterRegistry:
    return AdapterRegistry(Log(objects), BASE, quota_of=quotas.get)


def test_adapters_are_counted_by_name(registry: AdapterRegistry, upload: Upload, quotas: dict[str, Quota]) -> None:
    quotas["acme"] = Quota(adapters=2)
    for seed, name in enumerate(("a", "b")):
        upload(name, seed, tenant="acme")
    before = registry._log.sizes()
    with pytest.raises(QuotaExceeded, match="has 2 adapters and may have 2") as caught:
        upload("c", 7, tenant="acme")
    assert (caught.value.status, caught.value.code) == (403, "quota_exceeded")
    assert registry._log.sizes() == before
    assert registry.list("acme")[0][-1].name == "b"
    upload("b", 8, tenant="acme", replace=True)  # no more names than before
    upload("c", 7, tenant="globex")
    upload("c", 7)
    registry.delete("a", "acme")
    upload("c", 7, tenant="acme")
    with pytest.raises(QuotaExceeded):
        registry.rollback("a", 1, "acme")
    registry.delete("b", "acme")
    assert registry.rollback("a", 1, "acme").version == 3


def test_bytes_are_those_of_all_versions_each_content_once(
    registry: AdapterRegistry, upload: Upload, quotas: dict[str, Quota]
) -> None:
    size = upload("a", 0, tenant="acme")[0].bytes
    quotas["acme"] = Quota(bytes=2 * size)
    upload("b", 0, tenant="acme")  # the same content again
    upload("a", 1, tenant="acme", replace=True)
    with pytest.raises(QuotaExceeded, match=f"keeps {2 * size} bytes of adapters, this needs {size} more"):
        upload("c", 2, tenant="acme")
    registry.delete("a", "acme")
    with pytest.raises(QuotaExceeded):  # deleted versions are kept
        upload("c", 2, tenant="acme")
    assert registry.rollback("a", 1, "acme").digest == registry.info("b", "acme").digest
    upload("c", 1, tenant="acme")
    quotas["acme"] = Quota(bytes=3 * size)
    upload("d", 2, tenant="acme")
    again = AdapterRegistry(registry._log, BASE, quota_of=quotas.get)
    with pytest.raises(QuotaExceeded):
        upload("e", 3, tenant="acme", to=again)


def test_what_takes_no_more_room_passes_under_a_lowered_quota(
    registry: AdapterRegistry, upload: Upload, quotas: dict[str, Quota]
) -> None:
    upload("a", 0, tenant="acme")
    upload("b", 1, tenant="acme")
    quotas["acme"] = Quota(adapters=0, bytes=0)
    assert not upload("a", 0, tenant="acme")[1]
    assert upload("a", 1, tenant="acme", replace=True)[1]
    assert registry.rollback("a", 1, "acme").version == 3
    with pytest.raises(QuotaExceeded):
        upload("a", 2, tenant="acme", replace=True)
    registry.delete("a", "acme")
    with pytest.raises(AdapterConflict):  # a taken name is refused as one
        upload("b", 2, tenant="acme")


def test_forms_that_the_server_makes_count_too(
    registry: AdapterRegistry, upload: Upload, quotas: dict[str, Quota]
) -> None:
    source, _ = upload("a", 0, tenant="acme")
    made = compress(registry.load(source.digest), Recipe())
    told: dict[str, Any] = {"kind": "lora", "warnings": [], "provenance": {"type": "compress"}}
    quotas["acme"] = Quota(adapters=1)
    with pytest.raises(QuotaExceeded):
        registry.require_free("b", made.modules, "acme", None, False)
    with pytest.raises(QuotaExceeded):
        registry.require_room("b", "acme")
    with pytest.raises(QuotaExceeded):
        registry.add_forms("b", made.modules, "compress", told, tenant="acme")
    registry.add_forms("a", made.modules, "compress", told, tenant="acme", replace=True)
    quotas["acme"] = Quota(bytes=source.bytes)
    upload("c", 3, tenant="globex")
    upload("d", 4, tenant="globex")
    quotas["globex"] = Quota(bytes=2 * source.bytes + 1)
    loads = {name: registry.load(registry.resolve(name, "globex").digest) for name in ("c", "d")}
    members = [
        MadeForms(name, compress(weights, Recipe()).modules, told, registry.resolve(name, "globex").digest)
        for name, weights in loads.items()
    ]
    before = registry._log.sizes()
    with pytest.raises(QuotaExceeded):  # both or none
        registry.add_collection(members, "compress", "globex")
    assert registry._log.sizes() == before


def test_uploads_at_once_keep_the_quota_exactly(tmp_path: Path) -> None:
    """All are checked before the first is stored, and none is stored before all have taken their turn."""
    quota = Quota(adapters=5)
    registry = AdapterRegistry(open_store(str(tmp_path / "store")), BASE, quota_of=lambda tenant: quota)
    count = 12
    together = threading.Barrier(count)
    folders = {number: write(tmp_path / f"{number}", factors(number)) for number in range(count)}

    def add(number: int) -> bool:
        config, weights = folders[number]
        found = registry.candidate(f"n{number}", config, weights, tenant="acme")
        together.wait(60)
        try:
            registry.store(found, found.proof(NOT_RUNNING))
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(count) as threads:
        stored = sum(threads.map(add, range(count)))
    assert len(registry.list("acme")[0]) == stored == 5


def test_a_version_counts_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one is refused while the first is still on its way; once that has failed, there is room again."""
    log = open_store(str(tmp_path / "store"))
    registry = AdapterRegistry(log, BASE, quota_of=lambda tenant: Quota(adapters=1))
    one, other = write(tmp_path / "1", factors(1)), write(tmp_path / "2", factors(2))
    refused: list[bool] = []

    def commit(*arguments: object, **options: object) -> Record:
        with pytest.raises(QuotaExceeded):
            registry.add("b", *other, tenant="acme")
        refused.append(True)
        raise AdapterNotFound("the store has lost its mind")

    with monkeypatch.context() as patched:
        patched.setattr(Log, "commit", commit)
        with pytest.raises(AdapterNotFound):
            registry.add("a", *one, tenant="acme")
    assert refused == [True]
    assert registry.add("b", *other, tenant="acme")[1]
