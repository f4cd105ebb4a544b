"""The report on an upload: what it says of the base, where it is kept, and what an uploader is told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store import proof
from adapters_store.candidate import NOT_RUNNING, Candidate
from adapters_store.errors import AdapterConflict, AdapterInvalid, PreconditionFailed
from adapters_store.forms import BaseSpec
from adapters_store.info import BaseCheck, ModuleCount, Notice, Probe, Proof
from adapters_store.log import Log, open_store
from adapters_store.objects import Objects
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import BASE, PREFIX, Upload, config, factors, restarted, write

STRONG, WEAK = Probe(53, 1.5, 0.25), Probe(53, proof.NOTICEABLE, 0.0)
NAME = BaseCheck("name", "tiny")


def checked(registry: AdapterRegistry, folder: Path, seed: int = 1, name: str = "legal", **options: Any) -> Candidate:
    return registry.candidate(name, *write(folder / str(seed), factors(seed)), **options)


@pytest.mark.parametrize(
    "made",
    [
        Proof(ModuleCount(4, 8), NAME, probe=STRONG),
        Proof(ModuleCount(4, 8), BaseCheck("shapes", None), None, NOT_RUNNING),
    ],
)
def test_a_proof_is_read_as_it_was_written(made: Proof) -> None:
    assert proof.decode(proof.encode(made)) == made
    assert proof.decode(proof.encode(None)) is None


@pytest.mark.parametrize(("found", "codes"), [(STRONG, []), (WEAK, [proof.NOOP]), (NOT_RUNNING, [])])
def test_an_adapter_that_changes_nothing_is_told(
    registry: AdapterRegistry, tmp_path: Path, found: Probe | Notice, codes: list[str]
) -> None:
    candidate = checked(registry, tmp_path)
    info, _ = registry.store(candidate, candidate.proof(found))
    assert [notice.code for notice in info.warnings] == codes


def test_it_is_told_once() -> None:
    told = (Notice(proof.NOOP, "Every delta is zero."),)
    assert proof.notices(Proof(ModuleCount(1, 1), NAME, WEAK), told) == ()
    assert proof.notices(None, ()) == ()


def test_a_candidate_is_not_stored(registry: AdapterRegistry, objects: Objects, tmp_path: Path) -> None:
    before = objects.sizes("")
    candidate = checked(registry, tmp_path)
    assert not candidate.known
    assert registry.weights(candidate).modules.keys() == {
        name for name in BASE.modules if name.endswith(("q_proj", "v_proj"))
    }
    assert objects.sizes("") == before
    assert registry.list() == ([], None)


def test_the_proof_stays_with_the_version(registry: AdapterRegistry, objects: Objects, tmp_path: Path) -> None:
    candidate = checked(registry, tmp_path)
    made = candidate.proof(STRONG)
    info, created = registry.store(candidate, made)
    assert created
    assert info.proof == made == Proof(ModuleCount(4, 8), NAME, STRONG)
    checked_again = checked(registry, tmp_path)
    assert checked_again.known
    assert registry.store(checked_again, checked_again.proof(WEAK)) == (info, False)
    other = checked(registry, tmp_path, 2, replace=True)
    assert registry.store(other, other.proof(WEAK))[0].version == 2
    back = registry.rollback("legal", 1)
    assert (back.version, back.proof, back.warnings) == (3, made, ())
    found = restarted(objects)
    assert [version.proof for version in found.versions("legal")] == [made, other.proof(WEAK), made]
    registry.delete("legal")
    assert registry.versions("legal")[0].proof is None


def test_a_measurement_is_no_part_of_the_content(registry: AdapterRegistry, tmp_path: Path) -> None:
    digests = set()
    for name, found in (("one", STRONG), ("two", WEAK)):
        candidate = checked(registry, tmp_path, name=name)
        digests.add(registry.store(candidate, candidate.proof(found))[0].digest)
    assert len(digests) == 1


def test_an_upload_without_an_engine_says_so(upload: Upload) -> None:
    info, _ = upload("legal", 1)
    assert info.proof == Proof(ModuleCount(4, 8), NAME, None, NOT_RUNNING)


def test_records_of_older_servers_have_none(registry: AdapterRegistry, objects: Objects, upload: Upload) -> None:
    made = registry._log.manifest(upload("legal", 1)[0].digest)
    assert Log(objects).commit("public", "older", 1, "upload", made)
    assert restarted(objects).info("older").proof is None


def test_who_comes_between_check_and_commit_wins(registry: AdapterRegistry, upload: Upload, tmp_path: Path) -> None:
    first = checked(registry, tmp_path)
    stored, _ = upload("legal", 2)
    with pytest.raises(AdapterConflict):
        registry.store(first, first.proof(STRONG))
    matched = checked(registry, tmp_path, if_match=stored.digest)
    upload("legal", 3, replace=True)
    with pytest.raises(PreconditionFailed):
        registry.store(matched, matched.proof(STRONG))
    assert [version.version for version in registry.versions("legal")] == [2, 1]


def test_refusals_come_with_the_check(registry: AdapterRegistry, upload: Upload, tmp_path: Path) -> None:
    upload("legal", 2)
    for options, kind in (
        ({}, AdapterConflict),
        ({"if_match": "0" * 64}, PreconditionFailed),
        ({"name": "Bad Name"}, AdapterInvalid),
    ):
        with pytest.raises(kind):
            checked(registry, tmp_path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("named", "by"), [("tiny", "name"), ("acme/other", "shapes"), (None, "shapes")])
def test_the_base_is_known_by_its_name_or_by_shapes(
    registry: AdapterRegistry, tmp_path: Path, named: str | None, by: str
) -> None:
    files = write(tmp_path / "x", factors(1), config(base_model_name_or_path=named))
    assert registry.candidate("legal", *files).base == BaseCheck(by, named)  # type: ignore[arg-type]


def test_the_base_is_known_by_its_weights(tmp_path: Path) -> None:
    """A file that holds a copy of the base's own embedding, as PEFT saves it beside a target there."""
    copied = torch.arange(32 * 8, dtype=torch.float32).reshape(32, 8)
    base: BaseSpec = replace(BASE, weight=lambda name: copied)
    registry = AdapterRegistry(open_store("memory://"), base)
    tensors = factors(1) | {f"{PREFIX}model.embed_tokens.weight": copied.clone()}
    found = registry.candidate("legal", *write(tmp_path / "x", tensors, config(base_model_name_or_path="other")))
    assert found.base == BaseCheck("weights", "other")
    tensors[f"{PREFIX}model.embed_tokens.weight"] += 1
    with pytest.raises(AdapterInvalid) as caught:
        registry.candidate("legal", *write(tmp_path / "y", tensors))
    assert caught.value.code == "base_mismatch"
