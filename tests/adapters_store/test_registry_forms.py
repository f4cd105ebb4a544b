"""Adapters that the server made itself: versions like any other, loaded as they were stored."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.compression.recipe import Recipe, compress
from adapters_store.errors import AdapterConflict, AdapterCorrupt, AdapterInvalid, AdapterNotFound, PreconditionFailed
from adapters_store.formats.forms_file import FORMS_FILE
from adapters_store.forms import LowRank
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
    record = registry._find("small", "public")[1]
    objects._put(f"blobs/sha256/{record.blobs[FORMS_FILE].digest}", b"\0" * info.bytes)
    assert registry.verify() == {info.digest}
    with pytest.raises(AdapterCorrupt):
        registry.load(info.digest)
    assert add_int8(registry, first, "small")[1] is False  # written again
    assert registry.load(info.digest).modules
