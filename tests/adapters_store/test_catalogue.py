"""Several registries over one store: what one appends, another takes in, by name or by a listing."""

from pathlib import Path

import pytest

from adapters_store.errors import AdapterConflict, AdapterNotFound
from adapters_store.log import Log
from adapters_store.objects import Objects
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import BASE, Upload, factors, restarted, write


def test_a_name_is_taken_in_by_itself(objects: Objects, registry: AdapterRegistry, upload: Upload) -> None:
    other = restarted(objects)
    upload("a", 1)
    upload("b", 1)
    with pytest.raises(AdapterNotFound):
        other.resolve("a")
    assert other.catalogue.refresh_name("public", "a")
    assert other.resolve("a") == registry.resolve("a")
    assert not other.catalogue.refresh_name("public", "a"), "nothing new"
    with pytest.raises(AdapterNotFound):
        other.resolve("b")
    registry.delete("a")
    assert other.catalogue.refresh_name("public", "a")
    with pytest.raises(AdapterNotFound, match="was deleted"):
        other.resolve("a")
    assert not other.catalogue.refresh_name("public", "never-used")
    assert other.catalogue.newest("public", "never-used") == 0


def test_everything_is_taken_in_by_one_listing(objects: Objects, registry: AdapterRegistry, upload: Upload) -> None:
    other = restarted(objects)
    for name in ("a", "b", "c"):
        upload(name, 1)
    other.catalogue.refresh_name("public", "a")
    upload("a", 2, replace=True)
    registry.delete("c")
    other.catalogue.catch_up()
    assert (
        other.catalogue.heads()
        == registry.catalogue.heads()
        == {("public", "a"): 2, ("public", "b"): 1, ("public", "c"): 2}
    )
    assert other.list() == registry.list()
    assert (
        other.catalogue.digests()
        == registry.catalogue.digests()
        == {registry.resolve("a").digest, registry.resolve("b").digest}
    )


def test_what_is_known_is_not_read_again(objects: Objects, upload: Upload, monkeypatch: pytest.MonkeyPatch) -> None:
    upload("a", 1)
    other = restarted(objects)
    upload("b", 1)
    read: list[str] = []
    get = objects.get

    def reading(key: str) -> bytes:
        read.append(key)
        return get(key)

    monkeypatch.setattr(objects, "get", reading)
    other.catalogue.catch_up()
    other.catalogue.refresh_name("public", "a")
    assert read == ["names/public/b/1.json"]


def test_commits_are_told_and_nothing_else(objects: Objects, tmp_path: Path) -> None:
    told: list[tuple[str, str, int]] = []
    registry = AdapterRegistry(Log(objects), BASE, committed=lambda *change: told.append(change))
    config, weights = write(tmp_path / "1", factors(1))
    registry.add("a", config, weights)
    registry.add("a", config, weights)  # the same content
    with pytest.raises(AdapterConflict):
        registry.add("a", *write(tmp_path / "2", factors(2)))
    registry.add("a", *write(tmp_path / "2", factors(2)), replace=True, tenant="other")
    registry.rollback("a", 1)  # is current
    registry.delete("a")
    registry.rollback("a", 1)
    restarted(objects).add("b", config, weights)
    registry.catalogue.refresh_name("public", "b")
    registry.catalogue.catch_up()
    assert told == [("public", "a", 1), ("other", "a", 1), ("public", "a", 2), ("public", "a", 3)]
