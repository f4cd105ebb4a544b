"""The registry on every backend: uploads, versions, references, tenants, replicas."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from obstore.store import MemoryStore

from adapters_store.bucket import Bucket, Stored
from adapters_store.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterNotFound,
    NameExpected,
    PreconditionFailed,
)
from adapters_store.forms import BaseSpec, LowRank
from adapters_store.local import LocalObjects
from adapters_store.log import Log
from adapters_store.objects import Objects
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import BASE, PREFIX, Upload, config, factors, restarted, write


def test_an_upload_is_listed_resolved_and_loaded(registry: AdapterRegistry, upload: Upload, tmp_path: Path) -> None:
    info, created = upload("legal", 1)
    assert created
    ref = registry.resolve("legal")
    assert (ref.name, ref.version, ref.digest, ref.tenant) == ("legal", 1, info.digest, "public")
    assert registry.list() == ([info], None)
    weights = registry.load(info.digest)
    assert weights.digest == info.digest
    expected = factors(1)
    for name, (form,) in weights.modules.items():
        assert isinstance(form, LowRank)
        assert torch.equal(form.a, expected[f"{PREFIX}{name}.lora_A.weight"])
        assert torch.equal(form.b, expected[f"{PREFIX}{name}.lora_B.weight"])
        assert form.d.tolist() == [2.0, 2.0]


def test_info_has_the_shape_of_the_api(upload: Upload) -> None:
    fields = dataclasses.asdict(upload("legal", 1)[0])
    assert json.loads(json.dumps(fields)).keys() == {
        *("name", "version", "digest", "kind", "forms", "rank", "modules", "parameters", "bytes", "base", "created"),
        *("event", "provenance", "compression", "warnings", "proof", "knobs", "virtual_tokens", "invocation", "tenant"),
    }
    assert (fields["kind"], fields["forms"], fields["event"]) == ("lora", ("low_rank",), "upload")
    assert fields["rank"] == {"min": 2, "max": 2}
    assert fields["modules"] == {"matched": 4, "total": 8}
    assert fields["parameters"] == sum(tensor.numel() for tensor in factors(1).values())
    assert fields["base"] == {"id": "tiny", "fingerprint": "f" * 64}
    assert fields["provenance"] == {"type": "upload"}


def test_the_same_content_again_is_no_new_version(registry: AdapterRegistry, upload: Upload) -> None:
    first, _ = upload("legal", 1)
    for options in ({}, {"replace": True}, {"if_match": "stale"}):
        assert upload("legal", 1, **options) == (first, False)
    assert len(registry.versions("legal")) == 1


def test_content_is_held_as_long_as_it_is_current_somewhere(registry: AdapterRegistry, upload: Upload) -> None:
    digest = upload("one", 1)[0].digest
    upload("two", 1, tenant="other")
    upload("one", 2, replace=True)
    assert registry.held(digest)
    registry.delete("two", "other")
    assert not registry.held(digest)
    assert registry.held(registry.resolve("one").digest)


def test_equal_content_has_one_digest_whatever_its_name(upload: Upload) -> None:
    assert upload("one", 1)[0].digest == upload("two", 1)[0].digest
    assert upload("three", 2)[0].digest != upload("one", 1)[0].digest


def test_other_content_needs_consent(registry: AdapterRegistry, upload: Upload) -> None:
    first, _ = upload("legal", 1)
    with pytest.raises(AdapterConflict) as caught:
        upload("legal", 2)
    assert (caught.value.status, caught.value.code) == (409, "adapter_exists")
    assert first.digest in caught.value.message
    assert registry.resolve("legal").digest == first.digest
    second, created = upload("legal", 2, if_match=f'"{first.digest}"')
    assert (created, second.version) == (True, 2)
    third, _ = upload("legal", 3, replace=True)
    assert third.version == 3
    assert [item.digest for item in registry.versions("legal")] == [third.digest, second.digest, first.digest]


@pytest.mark.parametrize("form", ["{}", '"{}"', "sha256:{}", 'W/"{}"', "*"])
def test_if_match_takes_every_spelling_of_the_digest(registry: AdapterRegistry, upload: Upload, form: str) -> None:
    first, _ = upload("legal", 1)
    assert upload("legal", 2, if_match=form.format(first.digest))[0].version == 2


@pytest.mark.parametrize("if_match", ["", '"x"', "0" * 64])
def test_a_wrong_if_match_changes_nothing(registry: AdapterRegistry, upload: Upload, if_match: str) -> None:
    first, _ = upload("legal", 1)
    for change in (lambda: upload("legal", 2, if_match=if_match), lambda: registry.delete("legal", if_match=if_match)):
        with pytest.raises(PreconditionFailed) as caught:
            change()
        assert (caught.value.status, caught.value.code) == (412, "digest_changed")
    assert registry.resolve("legal").digest == first.digest
    with pytest.raises(PreconditionFailed):
        upload("fresh", 1, if_match=first.digest)


def test_delete_and_upload_again(registry: AdapterRegistry, upload: Upload) -> None:
    first, _ = upload("legal", 1)
    registry.delete("legal", if_match=first.digest)
    for reference in ("legal", "legal@1"):
        with pytest.raises(AdapterNotFound, match=f"`{reference}` was deleted") as caught:
            registry.resolve(reference)
        assert '`POST /adapters/legal/rollback` with `{"version": 1}`' in caught.value.message
    with pytest.raises(AdapterNotFound, match="`legal@2` does not exist"):
        registry.resolve("legal@2")
    with pytest.raises(AdapterNotFound, match="was deleted"):
        registry.delete("legal")
    with pytest.raises(AdapterNotFound, match="`legal` does not exist"):
        registry.resolve("legal", "another-tenant")
    assert registry.list() == ([], None)
    assert [item.kind for item in registry.versions("legal")] == ["deleted", "lora"]
    assert registry.resolve(f"sha256:{first.digest}").digest == first.digest  # running work goes on
    assert registry.load(first.digest).modules
    again, created = upload("legal", 1)
    assert (again.version, created, again.digest) == (3, True, first.digest)
    assert registry.resolve("legal@1").version == 1
    with pytest.raises(AdapterNotFound):
        registry.resolve("legal@2")


@pytest.mark.parametrize("reference", ["legal@1", "base:legal", f"sha256:{'0' * 64}"])
def test_what_acts_on_a_name_takes_no_version(registry: AdapterRegistry, upload: Upload, reference: str) -> None:
    upload("legal", 1)
    for change in (registry.delete, registry.versions, lambda name: registry.rollback(name, 1)):
        with pytest.raises(NameExpected, match="takes an adapter's name") as caught:
            change(reference)
        assert (caught.value.status, caught.value.code) == (400, "name_expected")
    assert registry.resolve("legal").version == 1


def test_the_names_of_the_base_are_taken(registry: AdapterRegistry, tmp_path: Path) -> None:
    known = AdapterRegistry(registry._log, dataclasses.replace(BASE, aliases=("small",)))
    for name in known.base.names:
        with pytest.raises(AdapterInvalid, match="means the base model") as caught:
            known.add(name, *write(tmp_path, {}))
        assert caught.value.code == "bad_name"


def test_a_digest_means_the_name_that_holds_it_now(registry: AdapterRegistry, upload: Upload) -> None:
    first, _ = upload("keeps", 1)
    upload("moves", 1)
    upload("moves", 2, replace=True)
    reference = f"sha256:{first.digest}"
    assert registry.resolve(reference).name == "keeps"
    registry.delete("keeps")
    registry.rollback("moves", 1)
    found = registry.resolve(reference)
    assert (found.name, found.version) == ("moves", 3)


def test_rollback_appends(registry: AdapterRegistry, upload: Upload) -> None:
    first, _ = upload("legal", 1)
    second, _ = upload("legal", 2, replace=True)
    back = registry.rollback("legal", 1)
    assert (back.version, back.digest, back.event) == (3, first.digest, "rollback")
    assert registry.rollback("legal", 3) == back
    assert registry.rollback("legal", 2).digest == second.digest
    for version in (0, 9):
        with pytest.raises(AdapterNotFound):
            registry.rollback("legal", version)
    registry.delete("legal")
    with pytest.raises(AdapterNotFound):
        registry.rollback("legal", 5)  # the deletion itself
    assert registry.rollback("legal", 1).version == 6
    assert registry.resolve("legal").digest == first.digest


def test_references(registry: AdapterRegistry, upload: Upload) -> None:
    first, _ = upload("legal", 1)
    second, _ = upload("legal", 2, replace=True)
    for reference, version in {
        "legal": 2,
        "legal@1": 1,
        "legal@2": 2,
        "base:legal": 2,
        "tiny:legal@1": 1,
        f"sha256:{first.digest}": 1,
    }.items():
        ref = registry.resolve(reference)
        assert (ref.name, ref.version) == ("legal", version)
        assert registry.info(reference).digest == ref.digest == (first, second)[version - 1].digest
    for reference in ("legal@3", "lega", "other:legal", "sha256:" + "0" * 64, "", "tiny"):
        with pytest.raises(AdapterNotFound) as caught:
            registry.resolve(reference)
        assert caught.value.code == "model_not_found"
    with pytest.raises(AdapterNotFound, match=r"Did you mean `legal`\?"):
        registry.resolve("legall")


def test_tenants_share_nothing_but_bytes(registry: AdapterRegistry, upload: Upload) -> None:
    first, _ = upload("legal", 1, tenant="acme")
    for reference in ("legal", "legal@1", f"sha256:{first.digest}"):
        with pytest.raises(AdapterNotFound) as caught:
            registry.resolve(reference, "globex")
        assert caught.value.message == f"The model `{reference}` does not exist."  # as if it were nowhere
    with pytest.raises(AdapterNotFound):
        registry.open_file("legal", "adapter_config.json", "globex")
    assert registry.list("globex") == ([], None)
    assert upload("legal", 1, tenant="globex")[1]
    registry.delete("legal", "globex")
    assert registry.resolve("legal", "acme").digest == first.digest
    with pytest.raises(ValueError, match="segment"):
        upload("legal", 1, tenant="../x")


def test_pages(registry: AdapterRegistry, upload: Upload) -> None:
    names = ["a", "b", "b.1", "b_", "c", "d-1", "e"]
    for name in names:
        upload(name, 1)
    found, cursor, pages = [], None, 0
    while True:
        infos, cursor = registry.list(cursor=cursor, limit=3)
        found += [info.name for info in infos]
        pages += 1
        if cursor is None:
            break
    assert (found, pages) == (sorted(names), 3)
    assert registry.list(limit=7)[1] is None
    assert registry.list(cursor="zzz") == ([], None)


def test_files_come_back_byte_for_byte(registry: AdapterRegistry, upload: Upload, tmp_path: Path) -> None:
    upload("legal", 1)
    settings, weights = write(tmp_path / "1", factors(1))
    for name, expected in {"adapter_config.json": settings, "adapter_model.safetensors": weights.read_bytes()}.items():
        size, chunks = registry.open_file("legal", name)
        assert (size, b"".join(chunks)) == (len(expected), expected)
    for name in ("README.md", "../lock", "adapter_model.bin", ""):
        with pytest.raises(AdapterNotFound) as caught:
            registry.open_file("legal", name)
        assert caught.value.code == "file_not_found"


def test_everything_survives_a_restart(objects: Objects, registry: AdapterRegistry, upload: Upload) -> None:
    upload("a", 1)
    upload("a", 2, replace=True)
    upload("b", 3, tenant="acme")
    upload("gone", 1)
    registry.delete("gone")
    again = restarted(objects)
    for tenant in ("public", "acme"):
        assert again.list(tenant) == registry.list(tenant)
    for name in ("a", "gone"):
        assert again.versions(name) == registry.versions(name)
    assert (
        again.load(again.resolve("a@1").digest).modules.keys()
        == registry.load(registry.resolve("a").digest).modules.keys()
    )
    assert upload("gone", 1, to=again)[0].version == 3


def test_an_adapter_of_another_base_is_never_loaded(objects: Objects, upload: Upload) -> None:
    info, _ = upload("legal", 1)
    other = AdapterRegistry(Log(objects), BaseSpec("other", "e" * 64, BASE.modules, BASE.head, BASE.tied))
    assert other.info("legal").base.id == "tiny"
    with pytest.raises(AdapterInvalid) as caught:
        other.load(info.digest)
    assert caught.value.code == "base_mismatch"
    assert upload("legal", 1, to=other, replace=True)[1] is True  # the same files on another base are another adapter


def test_two_replicas_follow_each_other(objects: Objects, registry: AdapterRegistry, upload: Upload) -> None:
    second = restarted(objects)
    info, _ = upload("legal", 1)
    with pytest.raises(AdapterNotFound):
        second.resolve("legal")
    assert upload("legal", 1, to=second) == (info, False)  # a change looks at the store first
    upload("legal", 2, to=second, replace=True)
    upload("legal", 3, replace=True)
    assert [item.version for item in registry.versions("legal")] == [3, 2, 1]
    registry.delete("legal")
    assert upload("legal", 2, to=second)[0].version == 5  # it had not heard that the name is free
    second.delete("legal")
    with pytest.raises(AdapterNotFound):
        registry.delete("legal")
    assert registry.rollback("legal", 1).version == 7
    second.refresh()
    assert second.versions("legal") == registry.versions("legal")


def test_warnings_reach_the_uploader(registry: AdapterRegistry, tmp_path: Path) -> None:
    info, _ = registry.add("legal", *write(tmp_path / "a", factors(1), config(base_model_name_or_path="another")))
    assert [notice.code for notice in info.warnings] == ["other_base_name"]
    assert registry.info("legal").warnings == info.warnings


def test_provenance_is_part_of_the_digest(registry: AdapterRegistry, tmp_path: Path) -> None:
    files = write(tmp_path / "a", factors(1))
    uploaded, _ = registry.add("one", *files)
    merged, _ = registry.add("two", *files, provenance={"type": "merge", "method": "linear"})
    assert merged.provenance == {"type": "merge", "method": "linear"}
    assert merged.digest != uploaded.digest


class CountingBucket(Bucket):
    """Notes every listing and every read."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.reads: list[str] = []

    def get(self, key: str) -> bytes:
        self.reads.append(key)
        return super().get(key)

    def list(self, prefix: str) -> dict[str, Stored]:
        self.reads.append(prefix)
        return super().list(prefix)


def test_a_start_reads_records_only_and_a_look_up_nothing(upload: Upload) -> None:
    """What makes 10,000 adapters start in seconds: three listings, one small read a version, no manifest, no blob."""
    bucket = CountingBucket()
    objects = Objects(bucket, shared=False)
    first = AdapterRegistry(Log(objects), BASE)
    for number in range(12):
        upload(f"a{number}", number % 3, to=first)
    upload("a0", 7, to=first, replace=True)
    bucket.reads.clear()
    again = AdapterRegistry(Log(objects), BASE)
    assert sorted(bucket.reads)[:2] == ["blobs/", "manifests/"]
    assert len([key for key in bucket.reads if key.endswith(".json")]) == 13
    assert len(bucket.reads) == 13 + 3
    bucket.reads.clear()
    assert again.resolve("a0").version == again.info("a0").version == 2
    assert len(again.list()[0]) == 12
    assert len(again.versions("a0")) == 2
    assert bucket.reads == []


def test_how_much_of_a_version_is_on_this_disk(registry: AdapterRegistry, upload: Upload, objects: Objects) -> None:
    info, _ = upload("legal", 1)
    assert registry.share_here("legal", 1) == (1.0 if isinstance(objects, LocalObjects) else 0.0)
    assert registry.share_here("legal", 2) == 0
    assert registry.share_here("other", info.version) == 0
