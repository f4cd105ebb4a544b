"""The registry under rot, races and a full disk."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store import canonical
from adapters_store.errors import AdapterConflict, AdapterCorrupt, CodedError, StoreUnavailable
from adapters_store.formats import peft
from adapters_store.objects import Objects
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import Upload, race, restarted


def rot(objects: Objects, prefix: str, change: Callable[[bytes], bytes]) -> None:
    for key in objects.sizes(prefix):
        objects.publish({key: change(objects.get(key))})


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("prefix", "change", "seen_at_start"),
    [
        ("blobs/", flipped, False),
        ("blobs/", lambda data: data[:-1], True),
        ("manifests/", flipped, False),
    ],
    ids=["bit in a blob", "short blob", "bit in a manifest"],
)
def test_rot_is_quarantined_and_healed_by_the_same_upload(
    objects: Objects, upload: Upload, prefix: str, change: Callable[[bytes], bytes], seen_at_start: bool
) -> None:
    info, _ = upload("legal", 1)
    rot(objects, prefix, change)
    other, _ = upload("sound", 2)
    again = restarted(objects)

    assert marked(again) == (["legal"] if seen_at_start else [])
    assert again.verify() == {info.digest}
    assert marked(again) == ["legal"]
    with pytest.raises(AdapterCorrupt) as caught:
        again.load(info.digest)
    assert (caught.value.status, caught.value.code) == (503, "adapter_corrupt")
    assert again.load(other.digest).modules  # the others are fine
    assert upload("legal", 1, to=again)[1] is False
    assert marked(again) == []
    assert again.load(info.digest).modules
    assert again.verify() == frozenset()


def test_a_file_is_verified_before_its_first_byte(objects: Objects, registry: AdapterRegistry, upload: Upload) -> None:
    upload("legal", 1)
    rot(objects, "blobs/", flipped)
    with pytest.raises(AdapterCorrupt):
        registry.open_file("legal", "adapter_model.safetensors")


def marked(registry: AdapterRegistry) -> list[str]:
    """Names of the adapters that are listed as damaged."""
    return [item.name for item in registry.list()[0] if any(n.code == "adapter_corrupt" for n in item.warnings)]


def download(registry: AdapterRegistry, name: str) -> bytes:
    return b"".join(registry.open_file(name, "adapter_model.safetensors")[1])


def test_the_upload_that_a_failed_download_asks_for_heals(
    objects: Objects, registry: AdapterRegistry, upload: Upload, tmp_path: Path
) -> None:
    upload("legal", 1)
    upload("twin", 1)  # shares the blobs
    rot(objects, "blobs/", flipped)
    with pytest.raises(AdapterCorrupt):
        download(registry, "legal")
    assert marked(registry) == ["legal", "twin"]
    assert upload("legal", 1)[1] is False
    assert marked(registry) == []
    for name in ("legal", "twin"):
        assert download(registry, name) == (tmp_path / "1" / "weights").read_bytes()


def test_an_upload_heals_damage_that_nobody_has_seen(
    objects: Objects, registry: AdapterRegistry, upload: Upload
) -> None:
    upload("legal", 1)
    rot(objects, "blobs/", flipped)
    rot(objects, "manifests/", flipped)
    assert upload("legal", 1)[1] is False
    assert registry.verify() == frozenset()
    assert download(registry, "legal")


def test_a_manifest_that_cannot_be_worded_again_is_replaced(
    objects: Objects, registry: AdapterRegistry, upload: Upload
) -> None:
    info, _ = upload("legal", 1, provenance={"type": "older"})
    rot(objects, "manifests/", flipped)
    healed, created = upload("legal", 1)
    assert (healed.version, created) == (2, True)
    assert registry.load(healed.digest).modules
    assert healed.digest != info.digest


def test_a_missing_manifest_is_healed(registry: AdapterRegistry, upload: Upload, objects: Objects) -> None:
    info, _ = upload("legal", 1)
    for key in objects.sizes("manifests/"):
        objects._bucket.delete(key)
    assert registry.verify() == {info.digest}
    assert upload("legal", 1)[1] is False
    assert registry.load(info.digest).modules


def test_a_rollback_does_not_hide_damage(objects: Objects, registry: AdapterRegistry, upload: Upload) -> None:
    upload("legal", 1)
    upload("legal", 2, replace=True)
    rot(objects, "blobs/", flipped)
    registry.rollback("legal", 1)
    registry.verify()
    assert marked(registry) == ["legal"]
    registry.rollback("legal", 2)
    assert registry.rollback("legal", 1).warnings


def test_too_few_descriptors_are_no_damage(
    registry: AdapterRegistry, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, _ = upload("legal", 1)

    def exhausted(*_: object) -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for module, function in ((canonical, "digest_file"), (peft.Loader, "load")):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, exhausted)
            with pytest.raises(StoreUnavailable):
                registry.load(info.digest)
            registry.verify()
            assert marked(registry) == []
    assert registry.load(info.digest).modules


def test_a_rotten_record_is_listed_and_can_be_replaced(objects: Objects, upload: Upload) -> None:
    upload("legal", 1)
    rot(objects, "names/", flipped)
    again = restarted(objects)
    assert [(item.name, item.warnings[0].code) for item in again.list()[0]] == [("legal", "adapter_corrupt")]
    with pytest.raises(AdapterCorrupt):
        again.resolve("legal")
    with pytest.raises(AdapterConflict):
        upload("legal", 1, to=again)
    assert upload("legal", 1, to=again, replace=True)[0].version == 2
    assert again.resolve("legal").version == 2


def test_verify_can_be_stopped(registry: AdapterRegistry, upload: Upload, objects: Objects) -> None:
    upload("legal", 1)
    rot(objects, "blobs/", flipped)
    assert registry.verify(stop=lambda: True) == frozenset()
    assert len(registry.verify()) == 1


def test_racing_uploads_of_a_new_name(objects: Objects, upload: Upload, tmp_path: Path) -> None:
    outcomes = race(8, lambda number: upload("legal", number, to=restarted(objects))[0].digest)
    winners = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(winners) == 1
    assert {outcome.status for outcome in outcomes if isinstance(outcome, CodedError)} == {409}
    final = restarted(objects)
    assert [(item.version, item.digest) for item in final.versions("legal")] == [(1, winners[0])]
    assert final.load(winners[0]).modules


def test_racing_replacements_with_if_match(objects: Objects, registry: AdapterRegistry, upload: Upload) -> None:
    first, _ = upload("legal", 100)
    outcomes = race(6, lambda number: upload("legal", number, if_match=first.digest)[0].version)
    assert [outcome for outcome in outcomes if not isinstance(outcome, CodedError)] == [2]
    assert [outcome.status for outcome in outcomes if isinstance(outcome, CodedError)] == [412] * 5


def test_racing_replacements_without_condition_all_count(registry: AdapterRegistry, upload: Upload) -> None:
    outcomes = race(6, lambda number: upload("legal", number, replace=True)[0].version)
    assert sorted(str(outcome) for outcome in outcomes) == ["1", "2", "3", "4", "5", "6"]
    assert len({item.digest for item in registry.versions("legal")}) == 6
