"""Generators in the store: versions of names of their own, over the same files as adapters."""

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store import canonical
from adapters_store.errors import (
    AdapterConflict,
    AdapterCorrupt,
    AdapterInvalid,
    AdapterNotFound,
    CodedError,
    NameExpected,
    PreconditionFailed,
)
from adapters_store.fsck import check
from adapters_store.generation.generator import Generator
from adapters_store.generators import MAX_LOSSES, GeneratorInfo, Generators
from adapters_store.limits import Limits
from adapters_store.log import Log
from adapters_store.objects import Objects
from adapters_store.quota import Quota, QuotaExceeded
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.generator_support import CONDITION, TASKS, losses, write_generator
from tests.adapters_store.support import BASE, Upload, race

FROM: dict[str, Any] = {"type": "upload"}
LATER = datetime.now(UTC) + timedelta(days=1)
Add = Callable[..., tuple[GeneratorInfo, bool]]


@pytest.fixture
def generators(objects: Objects) -> Generators:
    return Generators(Log(objects), BASE)


@pytest.fixture
def add(generators: Generators, tmp_path: Path) -> Add:
    """`add(name, seed, **options)` adds the generator of that seed."""

    def make(name: str, seed: int = 0, **options: Any) -> tuple[GeneratorInfo, bool]:
        target: Generators = options.pop("to", generators)
        path = write_generator(tmp_path, seed)
        return target.add(name, path, "upload", FROM, losses(seed), **options)

    return make


def refused(kind: type[CodedError], code: str, action: Callable[[], object]) -> None:
    with pytest.raises(kind) as found:
        action()
    assert found.value.code == code


def load(generators: Generators, info: GeneratorInfo) -> Generator:
    with generators.opened(info) as (found, _):
        return found


def test_added_found_and_deleted(
    generators: Generators, objects: Objects, add: Add, tmp_path: Path, registry: AdapterRegistry
) -> None:
    info, created = add("icm")
    path = write_generator(tmp_path)
    assert (created, info.name, info.version, info.event) == (True, "icm", 1, "upload")
    assert (info.digest, info.bytes) == (canonical.digest_file(path), path.stat().st_size)
    assert (info.tasks, info.condition, info.base.fingerprint) == (list(TASKS), CONDITION, BASE.fingerprint)
    assert info.layout == {
        "modules": 4,
        "targets": ["q_proj", "v_proj"],
        "rank": {"min": 2, "max": 2},
        "numbers": 2 * 2 * (8 + 8 + 8 + 4),
        "dtype": "F32",
    }
    assert [loss["epoch"] for loss in info.losses] == [1, 2]
    assert info.sizes["generator"] == info.bytes
    assert json.loads(json.dumps(asdict(info)))["tasks"] == list(TASKS)
    assert add("icm") == (info, False)
    for each in (generators, Generators(Log(objects), BASE)):
        assert each.info("icm") == each.info("icm@1") == each.info(f"sha256:{info.digest}") == info
        assert each.list() == ([info], None)
    size, pieces = generators.open_file("icm")
    assert b"".join(pieces) == path.read_bytes()
    assert size == info.bytes
    with generators.opened(info) as (found, kept):
        assert found.digest == info.digest
        assert kept.read_bytes() == path.read_bytes()
    assert registry.list() == ([], None)
    refused(AdapterNotFound, "model_not_found", lambda: registry.resolve("icm"))
    generators.delete("icm")
    for reference in ("icm", "icm@1", f"sha256:{info.digest}x", "nobody", "a b"):
        refused(AdapterNotFound, "generator_not_found", partial(generators.info, reference))
    assert generators.list() == ([], None)
    assert add("icm")[0].version == 3


def test_a_name_may_be_an_adapter_and_a_generator(
    generators: Generators, registry: AdapterRegistry, add: Add, upload: Upload, objects: Objects
) -> None:
    upload("both", 1)
    add("both")
    again = AdapterRegistry(Log(objects), BASE)
    assert [info.kind for info in again.list()[0]] == ["lora"]
    registry.delete("both")
    assert generators.info("both").version == 1


def test_versions_and_conditions(generators: Generators, add: Add) -> None:
    first, _ = add("icm", 0)
    refused(AdapterConflict, "adapter_exists", lambda: add("icm", 1))
    refused(PreconditionFailed, "digest_changed", lambda: add("icm", 1, if_match="0" * 64))
    second, created = add("icm", 1, if_match=first.digest)
    assert (created, second.version, second.digest != first.digest) == (True, 2, True)
    assert add("icm", 0, replace=True)[0].version == 3
    assert generators.info("icm@2").digest == second.digest
    assert generators.info(f"sha256:{second.digest}").version == 2
    refused(NameExpected, "name_expected", lambda: generators.delete("icm@2"))
    refused(PreconditionFailed, "digest_changed", lambda: generators.delete("icm", if_match=second.digest))
    refused(AdapterConflict, "adapter_exists", lambda: generators.require_free("icm"))
    assert generators.require_free("icm", replace=True) is generators.require_free("free") is None
    assert generators.require_free("icm", recipe="other", replace=True) is None


def test_the_training_that_a_name_holds(generators: Generators, tmp_path: Path) -> None:
    info, _ = generators.add("icm", write_generator(tmp_path), "train", {"recipe": "r"})
    assert generators.require_free("icm", recipe="r") == info


def test_tenants_do_not_see_each_other(generators: Generators, add: Add) -> None:
    info, _ = add("icm", tenant="one")
    for reference in ("icm", f"sha256:{info.digest}"):
        refused(AdapterNotFound, "generator_not_found", partial(generators.info, reference, "two"))
    assert generators.list("two") == ([], None)
    assert generators.info("icm", "one") == info


def test_public_ones_are_seen_by_all_and_changed_by_none(generators: Generators, add: Add) -> None:
    public, _ = add("icm", 0)
    add("public-only", 0)
    for reference in ("icm", "icm@1", f"sha256:{public.digest}"):
        assert generators.info(reference, "one").digest == public.digest
    refused(AdapterNotFound, "generator_not_found", lambda: generators.delete("icm", "one"))
    own, created = add("icm", 1, tenant="one")
    assert (created, own.version) == (True, 1)
    assert generators.info("icm", "one") == own
    assert [info.digest for info in generators.list("one")[0]] == [own.digest, public.digest]
    page, following = generators.list("one", limit=1)
    assert ([info.name for info in page], following) == (["icm"], "icm")
    generators.delete("icm", "one")
    assert generators.info("icm", "one") == generators.info("icm") == public


def test_pages(generators: Generators, add: Add) -> None:
    for name in ("a", "b", "c"):
        add(name)
    page, following = generators.list(limit=2)
    assert ([info.name for info in page], following) == (["a", "b"], "b")
    page, following = generators.list(cursor="b", limit=2)
    assert ([info.name for info in page], following) == (["c"], None)


def test_what_others_write_is_seen(generators: Generators, objects: Objects, add: Add) -> None:
    other = Generators(Log(objects), BASE)
    info, _ = add("icm", to=other)
    assert generators.info("icm") == info
    other.delete("icm")
    refused(AdapterNotFound, "generator_not_found", lambda: generators.info("icm"))


def test_of_writers_at_once_each_has_a_version(generators: Generators, add: Add, tmp_path: Path) -> None:
    path = write_generator(tmp_path)
    found = race(4, lambda number: generators.add(f"icm-{number % 2}", path, "upload", FROM, replace=True))
    assert all(isinstance(outcome, tuple) for outcome in found)
    assert [info.version for info in generators.list()[0]] == [1, 1]


@pytest.mark.parametrize(
    ("name", "code"), [("Bad/", "bad_name"), ("base", "bad_name"), ("x" * 65, "bad_name"), ("", "bad_name")]
)
def test_bad_names(generators: Generators, add: Add, name: str, code: str) -> None:
    refused(AdapterInvalid, code, lambda: add(name))
    refused(AdapterInvalid, code, lambda: generators.require_free(name))


def test_files_that_are_no_generators(generators: Generators, objects: Objects, tmp_path: Path) -> None:
    def file(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    good = write_generator(tmp_path).read_bytes()
    for code, path in (
        ("generator_invalid", file("empty", b"")),
        ("generator_invalid", file("pickle", b"\x80\x02}q\x00.")),
        ("generator_invalid", file("cut", good[:-4])),
        ("generator_invalid", file("more", good + b"\0")),
        ("generator_invalid", file("nan", good[:-4] + b"\xff\xff\xff\x7f")),
        ("base_mismatch", write_generator(tmp_path / "other", base="e" * 64)),
    ):
        refused(AdapterInvalid, code, partial(generators.add, "icm", path, "upload", FROM))
    tight = Generators(Log(objects), BASE, Limits(max_rank=1))
    refused(AdapterInvalid, "rank_limit", lambda: tight.add("icm", write_generator(tmp_path), "upload", FROM))
    assert generators.list() == ([], None)
    assert Log(objects).sizes() == {}


def test_losses_are_thinned(generators: Generators, tmp_path: Path) -> None:
    curve = [{"epoch": epoch, "reconstruction": 1 / epoch, "kl": 0.5} for epoch in range(1, 1001)]
    info, _ = generators.add("icm", write_generator(tmp_path), "train", FROM, curve)
    assert len(info.losses) <= MAX_LOSSES
    assert info.losses[-1] == curve[-1]


def test_fsck_and_gc_know_generators(generators: Generators, objects: Objects, add: Add, upload: Upload) -> None:
    upload("legal", 1)
    info, _ = add("icm")
    report = check(Log(objects))
    assert (report.versions, report.files, report.unreferenced, report.problems) == (2, 5, 0, [])
    assert Log(objects).unreferenced(LATER) == {}
    generators.delete("icm")
    assert Log(objects).unreferenced(LATER) == {}  # as of a deleted adapter
    key = f"blobs/sha256/{info.digest}"
    data = objects.get(key)
    objects.publish({key: data[:-1]})
    [problem] = check(Log(objects)).problems
    assert (problem.code, problem.where) == ("blob_damaged", "generators/public/icm@1")


def test_damage_is_told_and_mended(generators: Generators, objects: Objects, add: Add) -> None:
    info, _ = add("icm")
    key = f"blobs/sha256/{info.digest}"
    data = objects.get(key)
    objects.publish({key: data[:-1] + bytes([data[-1] ^ 1])})
    refused(AdapterCorrupt, "adapter_corrupt", lambda: load(generators, info))
    refused(AdapterCorrupt, "adapter_corrupt", lambda: generators.open_file("icm"))
    assert add("icm") == (info, False)
    assert load(generators, info).digest == info.digest
    record = "generators/public/icm/1.json"
    objects.publish({record: objects.get(record)[:-2]})
    after = Generators(Log(objects), BASE)
    refused(AdapterCorrupt, "adapter_corrupt", lambda: after.info("icm"))
    assert [(found.name, found.digest, found.warnings[0].code) for found in after.list()[0]] == [
        ("icm", "", "adapter_corrupt")
    ]
    assert add("icm", to=after, replace=True)[0].version == 2


def test_a_loaded_generator_is_the_stored_one(generators: Generators, add: Add) -> None:
    one, other = (load(generators, add(f"icm-{seed}", seed)[0]) for seed in (0, 1))
    assert list(one.tasks) == list(TASKS)
    assert not torch.equal(one.tasks["law"].latent, other.tasks["law"].latent)


@pytest.mark.parametrize("bound", ["adapters", "bytes"])
def test_a_quota_bounds_generators_beside_adapters(objects: Objects, add: Add, tmp_path: Path, bound: str) -> None:
    size = write_generator(tmp_path, 0).stat().st_size
    quota = Quota(adapters=1) if bound == "adapters" else Quota(bytes=size)

    def quota_of(tenant: str) -> Quota | None:
        return quota if tenant == "a" else None

    bounded = Generators(Log(objects), BASE, quota_of=quota_of)
    assert add("one", 0, to=bounded, tenant="a")[1]
    assert not add("one", 0, to=bounded, tenant="a")[1], "what is there already takes no room"
    refused(QuotaExceeded, "quota_exceeded", lambda: add("two", 1, to=bounded, tenant="a"))
    assert [each.name for each in bounded.list("a")[0]] == ["one"]
    assert add("two", 1, to=bounded, tenant="b")[1]
