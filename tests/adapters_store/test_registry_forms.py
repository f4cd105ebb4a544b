"""Adapters that the server made itself: versions like any other, loaded as they were stored."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.candidate import FormFiles
from adapters_store.compression.jointly import JointRecipe, compress_jointly
from adapters_store.compression.recipe import Recipe, compress
from adapters_store.errors import (
    AdapterConflict,
    AdapterCorrupt,
    AdapterInvalid,
    AdapterNotFound,
    KnobRefused,
    PreconditionFailed,
)
from adapters_store.formats import forms_file, tensors
from adapters_store.formats.forms_file import BASIS_FILE, FORMS_FILE
from adapters_store.forms import LowRank, MadeForms, SharedBasis
from adapters_store.info import AdapterInfo
from adapters_store.objects import Objects
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import Upload, restarted

TOLD: dict[str, Any] = {
    "kind": "lora",
    "warnings": [],
    "provenance": {"type": "compress", "source": "s" * 64},
    "compression": {"dtype": "int8", "relative_error": 0.01},
    "module_errors": {"a": 0.01},
}


def add_int8(registry: AdapterRegistry, source: AdapterInfo, name: str, **options: Any) -> tuple[AdapterInfo, bool]:
    made = compress(registry.load(source.digest), Recipe())
    return registry.add_forms(name, made.modules, "compress", TOLD, **options)


def test_the_next_version_holds_the_forms(registry: AdapterRegistry, objects: Objects, upload: Upload) -> None:
    first, _ = upload("legal", 1)
    info, created = add_int8(registry, first, "legal", if_match=first.digest)
    assert (created, info.version, info.event, info.kind, info.forms) == (True, 2, "compress", "lora", ("low_rank",))
    assert (info.compression, info.provenance) == (TOLD["compression"], TOLD["provenance"])
    assert (info.rank, info.modules, info.base) == (first.rank, first.modules, first.base)
    assert info.parameters == first.parameters
    made = compress(registry.load(first.digest), Recipe()).modules
    for each in (registry, restarted(objects)):
        assert each.resolve("legal").digest == info.digest
        for name, (form,) in each.load(info.digest).modules.items():
            expected = made[name][0]
            assert isinstance(form, LowRank)
            assert isinstance(expected, LowRank)
            assert form.a.dtype == torch.int8
            assert torch.equal(form.a, expected.a)
            assert torch.equal(form.b, expected.b)
            assert torch.equal(form.d, expected.d)
    assert registry._log.manifest(info.digest)["module_errors"] == TOLD["module_errors"]
    assert registry.rollback("legal", 1).digest == first.digest


def test_the_files_are_those_of_peft(registry: AdapterRegistry, upload: Upload, tmp_path: Path) -> None:
    first, _ = upload("legal", 1)
    info, _ = add_int8(registry, first, "small")
    files = {}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        size, pieces = registry.open_file("small", name)
        files[name] = b"".join(pieces)
        assert len(files[name]) == size
    (tmp_path / "weights").write_bytes(files["adapter_model.safetensors"])
    again, _ = registry.add("again", files["adapter_config.json"], tmp_path / "weights")
    assert (again.rank, again.modules) == (info.rank, info.modules)
    assert registry.open_file("small", FORMS_FILE)[0] == info.bytes
    with pytest.raises(AdapterNotFound):
        registry.open_file("small", "adapter_model.bin")


def test_the_same_again_is_no_new_version(registry: AdapterRegistry, upload: Upload) -> None:
    first, _ = upload("legal", 1)
    info, _ = add_int8(registry, first, "small")
    assert add_int8(registry, first, "small") == (info, False)


def test_what_add_refuses_is_refused_here(registry: AdapterRegistry, upload: Upload) -> None:
    first, _ = upload("legal", 1)
    upload("other", 2)
    for name, options, kind in (
        ("other", {}, AdapterConflict),
        ("legal", {"if_match": "0" * 64}, PreconditionFailed),
        ("Bad Name", {}, AdapterInvalid),
    ):
        with pytest.raises(kind):
            add_int8(registry, first, name, **options)
    assert [len(registry.versions(name)) for name in ("legal", "other")] == [1, 1]
    assert add_int8(registry, first, "other", replace=True)[0].version == 2


def test_a_damaged_file_is_found(tmp_path: Path, upload: Upload, registry: AdapterRegistry, objects: Objects) -> None:
    first, _ = upload("legal", 1)
    info, _ = add_int8(registry, first, "small")
    record = registry._names.find("small", "public")[1]
    objects._put(f"blobs/sha256/{record.blobs[FORMS_FILE].digest}", b"\0" * info.bytes)
    assert registry.verify() == {info.digest}
    with pytest.raises(AdapterCorrupt):
        registry.load(info.digest)
    assert add_int8(registry, first, "small")[1] is False  # written again
    assert registry.load(info.digest).modules


def collection(registry: AdapterRegistry, sources: list[AdapterInfo]) -> list[MadeForms]:
    members = compress_jointly([registry.load(source.digest) for source in sources], JointRecipe("jd_full", rank=2))
    return [
        MadeForms(source.name, member.made.modules, TOLD | {"module_errors": member.made.errors}, source.digest)
        for source, member in zip(sources, members, strict=True)
    ]


def test_a_collection_shares_one_basis_file(registry: AdapterRegistry, objects: Objects, upload: Upload) -> None:
    sources = [upload(name, seed)[0] for seed, name in enumerate(("one", "two", "three"))]
    made = collection(registry, sources)
    stored = registry.add_collection(made, "compress")
    assert [(info.name, info.version, created) for info, created in stored] == [
        ("one", 2, True),
        ("two", 2, True),
        ("three", 2, True),
    ]
    blobs = [registry._names.find(info.name, "public")[1].blobs for info, _ in stored]
    assert len({each[BASIS_FILE].digest for each in blobs}) == 1
    assert len({each[FORMS_FILE].digest for each in blobs}) == 3
    assert all(info.forms == ("shared_basis",) and info.bytes < sources[0].bytes for info, _ in stored)
    for each in (registry, restarted(objects)):
        for info, forms in zip(stored, made, strict=True):
            loaded = each.load(info[0].digest).modules
            for name, (form,) in forms.modules.items():
                found = loaded[name][0]
                assert isinstance(form, SharedBasis)
                assert isinstance(found, SharedBasis)
                assert all(torch.equal(getattr(form, part), getattr(found, part)) for part in ("u", "v", "core"))
    assert registry.add_collection([replace(each, if_match="*") for each in made], "compress")[0][1] is False


def test_a_collection_is_all_or_nothing(registry: AdapterRegistry, upload: Upload) -> None:
    """Whoever has been replaced meanwhile keeps what it has, and so do the others."""
    sources = [upload(name, seed)[0] for seed, name in enumerate(("one", "two", "three"))]
    made = collection(registry, sources)
    upload("three", 9, replace=True)
    with pytest.raises(PreconditionFailed):
        registry.add_collection(made, "compress")
    registry.delete("three")
    with pytest.raises(PreconditionFailed):
        registry.add_collection(made, "compress")
    assert [len(registry.versions(name)) for name in ("one", "two", "three")] == [1, 1, 3]


def test_a_damaged_basis_is_damage_of_all_who_share_it(
    registry: AdapterRegistry, objects: Objects, upload: Upload
) -> None:
    sources = [upload(name, seed)[0] for seed, name in enumerate(("one", "two"))]
    stored = [info for info, _ in registry.add_collection(collection(registry, sources), "compress")]
    blob = registry._names.find("one", "public")[1].blobs[BASIS_FILE]
    objects._put(f"blobs/sha256/{blob.digest}", b"\0" * blob.size)
    assert registry.verify() == {info.digest for info in stored}
    with pytest.raises(AdapterCorrupt):
        registry.load(stored[1].digest)


def test_what_a_request_must_know_comes_with_the_reference(
    registry: AdapterRegistry, objects: Objects, upload: Upload
) -> None:
    more = {"knobs": {"rank": {"max": 2}}, "virtual_tokens": 5, "invocation": [7, 3]}
    modules = registry.load(upload("plain", 1)[0].digest).modules
    info, _ = registry.add_forms("dial", modules, "made", {**TOLD, **more})
    for each in (registry, restarted(objects)):
        ref = each.resolve("dial")
        assert (ref.knobs, ref.virtual_tokens, ref.invocation) == (more["knobs"], 5, (7, 3))
        assert (info.knobs, info.virtual_tokens, info.invocation) == (more["knobs"], 5, (7, 3))
        assert each.resolve("plain") == replace(each.resolve("plain"), knobs={}, virtual_tokens=0, invocation=())


def test_a_kind_without_knobs_has_no_variants(registry: AdapterRegistry, upload: Upload) -> None:
    first, _ = upload("legal", 1)
    made, _ = add_int8(registry, first, "small")
    for digest in (first.digest, made.digest):
        assert registry.load(digest).digest == digest
        with pytest.raises(KnobRefused, match="rank"):
            registry.load(f"{digest}:rank=1")


def test_forms_in_files_are_stored_as_forms_in_memory(
    registry: AdapterRegistry, upload: Upload, tmp_path: Path
) -> None:
    source = upload("source", 1)[0]
    modules = registry.load(source.digest).modules
    named = {
        f"{name}.{part}": getattr(form, part)
        for name, (form,) in modules.items()
        if isinstance(form, LowRank)
        for part in ("a", "b", "d")
    }
    tensors.write(tmp_path / "forms", named)
    made = FormFiles({FORMS_FILE: tmp_path / "forms"}, forms_file.facts(modules), len(modules))
    told = {"kind": "lora", "warnings": [], "provenance": {"type": "merge"}}
    info, created = registry.add_forms("made", made, "merge", told)
    assert (created, info.event, info.rank, info.modules) == (True, "merge", source.rank, source.modules)
    loaded = registry.load(info.digest).modules
    assert loaded.keys() == modules.keys()
    for name, (form,) in loaded.items():
        (expected,) = modules[name]
        assert isinstance(form, LowRank)
        assert isinstance(expected, LowRank)
        assert all(torch.equal(getattr(form, part), getattr(expected, part)) for part in ("a", "b", "d"))
    assert registry.add_forms("made", made, "merge", told)[1] is False
