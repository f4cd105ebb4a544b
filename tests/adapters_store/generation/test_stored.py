"""Generated adapters by name: stored as recipes, loaded as forms, exported to PEFT, one generator for all of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from adapters_store.errors import AdapterCorrupt, AdapterNotFound, KnobRefused
from adapters_store.fsck import check
from adapters_store.generation import files, generator_file, recipe
from adapters_store.generation.generator import Generator
from adapters_store.generation.generator_file import GENERATOR_FILE
from adapters_store.generation.opened import OpenedGenerators
from adapters_store.generation.recipe import RECIPE_FILE
from adapters_store.info import AdapterInfo
from adapters_store.log import Log
from adapters_store.objects import Objects
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.generation.support import NOT_PINNED, TASKS, distance, trained
from tests.adapters_store.support import BASE, PREFIX, Upload, restarted

TOLD: dict[str, Any] = {"kind": files.KIND, "warnings": [], "provenance": {"type": "generate"}}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Generator, Path]:
    path = tmp_path / "generator"
    return generator_file.save(trained().generator, path), path


def recipe_of(generator: Generator, task: str, seed: int = 1) -> recipe.Recipe:
    known = generator.tasks[task]
    return recipe.make(generator, known.condition, known.statistics, seed=seed)


def add(registry: AdapterRegistry, saved: tuple[Generator, Path], name: str, task: str, seed: int = 1) -> AdapterInfo:
    generator, path = saved
    made = files.files_of(recipe_of(generator, task, seed), generator, path)
    registry.require_free(name, made, "public", None, True)
    return registry.add_forms(name, made, "generate", TOLD, replace=True)[0]


def modules_of(registry: AdapterRegistry, digest: str) -> dict[str, Any]:
    return {name: form for name, (form,) in registry.load(digest).modules.items()}


def test_stored_and_loaded(registry: AdapterRegistry, objects: Objects, saved: tuple[Generator, Path]) -> None:
    generator, path = saved
    infos = {task: add(registry, saved, task, task) for task in TASKS}
    path.write_bytes(b"")  # the store has its own
    for task, info in infos.items():
        assert (info.kind, info.forms, info.event) == ("icm_lora", ("low_rank",), "generate")
        assert (info.rank.min, info.rank.max, info.modules.matched) == (2, 2, 4)
        assert info.parameters == generator.layout.numbers
        assert info.bytes == len(recipe.encode(recipe_of(generator, task)))
        for each in (registry, restarted(objects)):
            loaded = modules_of(each, info.digest)
            expected = recipe.expand(recipe_of(generator, task), generator)
            assert all(
                torch.equal(getattr(form, part), getattr(expected[name], part))
                for name, form in loaded.items()
                for part in ("a", "b", "d")
            )
            [other] = TASKS.keys() - {task}
            assert distance(loaded, TASKS[task]) < NOT_PINNED
            assert distance(loaded, TASKS[other]) > 1
        with pytest.raises(KnobRefused):
            registry.load(f"{info.digest}:rank=1")
    blobs = [registry._names.find(task, "public")[1].blobs for task in TASKS]
    assert len({each[GENERATOR_FILE].digest for each in blobs}) == 1
    assert len({each[RECIPE_FILE].digest for each in blobs}) == len(TASKS)


def test_the_same_again_is_no_new_version(registry: AdapterRegistry, saved: tuple[Generator, Path]) -> None:
    first = add(registry, saved, "made", "left")
    assert add(registry, saved, "made", "left") == first
    assert add(registry, saved, "made", "left", seed=2).version == 2


def test_the_files_are_those_of_peft(registry: AdapterRegistry, saved: tuple[Generator, Path], tmp_path: Path) -> None:
    info = add(registry, saved, "made", "left")
    found = {}
    for name in ("adapter_config.json", "adapter_model.safetensors", RECIPE_FILE, GENERATOR_FILE):
        size, pieces = registry.open_file("made", name)
        found[name] = b"".join(pieces)
        assert len(found[name]) == size
    made = modules_of(registry, info.digest)
    weights = load(found["adapter_model.safetensors"])
    assert len(weights) == 2 * len(made)
    assert json.loads(found["adapter_config.json"])["r"] == 2
    for name, form in made.items():
        delta = weights[f"{PREFIX}{name}.lora_B.weight"] @ weights[f"{PREFIX}{name}.lora_A.weight"]
        assert torch.allclose(delta, form.b * form.d @ form.a, atol=1e-5)
    (tmp_path / "weights").write_bytes(found["adapter_model.safetensors"])
    again, _ = registry.add("again", found["adapter_config.json"], tmp_path / "weights")
    assert (again.rank, again.modules) == (info.rank, info.modules)
    with pytest.raises(AdapterNotFound):
        registry.open_file("made", "adapter_forms.safetensors")


def test_fsck_and_collection(
    registry: AdapterRegistry, objects: Objects, saved: tuple[Generator, Path], upload: Upload
) -> None:
    infos = [add(registry, saved, task, task) for task in TASKS]
    upload("plain", 1)
    report = check(Log(objects))
    assert (report.versions, report.problems, report.unreferenced) == (3, [], 0)
    assert report.files == 3 + 2 + 1 + 2  # manifests, recipes, the generator, an upload's two
    registry.delete("left")
    assert modules_of(restarted(objects), infos[1].digest)
    assert check(Log(objects)).problems == []


def test_a_damaged_generator_is_damage_of_all_that_it_makes(
    registry: AdapterRegistry, objects: Objects, saved: tuple[Generator, Path]
) -> None:
    infos = [add(registry, saved, task, task) for task in TASKS]
    blob = registry._names.find("left", "public")[1].blobs[GENERATOR_FILE]
    objects._put(f"blobs/sha256/{blob.digest}", b"\0" * blob.size)
    assert registry.verify() == {info.digest for info in infos}
    for info in infos:
        with pytest.raises(AdapterCorrupt):
            registry.load(info.digest)
    add(registry, saved, "left", "left")  # writes it again
    assert modules_of(registry, infos[1].digest)


def test_a_generator_is_opened_once_and_leaves_when_others_need_the_room() -> None:
    one, other = trained().generator, trained().generator
    size = 4 * one.parameters
    loads: list[str] = []

    def ask(opened: OpenedGenerators, digest: str) -> Generator:
        def load() -> Generator:
            loads.append(digest)
            return one if digest == "one" else other

        return opened.get(digest, load)

    opened = OpenedGenerators(limit=size)
    for digest in ("one", "one", "other", "one"):
        ask(opened, digest)
    assert loads == ["one", "other", "one"]
    loads.clear()
    both = OpenedGenerators(limit=2 * size)
    for digest in ("one", "other", "one", "other"):
        ask(both, digest)
    assert loads == ["one", "other"]
    loads.clear()
    none = OpenedGenerators(limit=size - 1)
    assert ask(none, "one") is one  # too large to keep, and still of use
    ask(none, "one")
    assert loads == ["one", "one"]


def test_a_recipe_whose_base_is_another(registry: AdapterRegistry, saved: tuple[Generator, Path]) -> None:
    generator, path = saved
    assert generator.base == BASE.fingerprint
    loader = files.RecipeLoader(BASE, registry.limits)
    path.with_name("recipe").write_bytes(recipe.encode(recipe_of(generator, "left")))
    paths = {RECIPE_FILE: path.with_name("recipe"), GENERATOR_FILE: path}
    assert loader.load(paths, "key").digest == "key"
