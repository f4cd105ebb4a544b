"""A collection compressed together through the whole service: measured, refused or stored, served and exported."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store.compression.jointly import JointRecipe
from adapters_store.compression.recipe import Bounds
from adapters_store.errors import AdapterConflict, AdapterInvalid, CodedError, PreconditionFailed
from adapters_store.forms import SharedBasis
from adapters_store.info import AdapterRef
from server.errors import InvalidRequest
from tests.e2e.test_compression import PATIENCE, PROMPTS, answer, service
from tests.e2e.world import World, build_world
from tests.support.server_process import ServerProcess

NAMES = ("plain", "other", "third")
ADAPTERS: dict[str, dict[str, Any]] = {name: {"r": 4 + 2 * n, "lora_alpha": 16} for n, name in enumerate(NAMES)}
ADAPTERS["narrow"] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
WIDE = JointRecipe("jd_full", rank=18)  # as many columns as the ranks of all three: nothing is lost but roundings


@pytest.fixture
def world(tmp_path: Path) -> World:
    return build_world(tmp_path, "llama", ADAPTERS)


async def test_every_adapter_gets_a_version(world: World) -> None:
    async with service(world) as (compressor, engine, _):
        sources = [world.registry.resolve(name) for name in NAMES]
        before = [await answer(engine, source.digest) for source in sources]
        stored = await compressor.compress_jointly(sources, WIDE, Bounds(0.05, 0.05), probe=PROMPTS)
        for source, (info, created, errors), tokens in zip(sources, stored, before, strict=True):
            assert (created, info.name, info.version, info.event) == (True, source.name, 2, "compress")
            assert info.forms == ("shared_basis",)
            assert {key: info.provenance[key] for key in ("type", "source", "method")} == {
                "type": "compress",
                "source": source.digest,
                "method": "jd_full",
            }
            parameters = info.provenance["parameters"]
            assert (parameters["rank"], parameters["clusters"], parameters["cluster"]) == (18, 1, 0)
            assert parameters["adapters"] == 3
            manifest = world.registry._log.manifest(info.digest)
            assert manifest["sources"] == sorted(each.digest for each in sources)
            assert manifest["module_errors"] == errors
            told = info.compression
            assert told is not None
            assert (told["dtype"], told["relative_error"] < 0.02) == ("jd_full", True)
            assert errors.keys() == world.registry.load(source.digest).modules.keys()
            assert await answer(engine, info.digest) == tokens
            for (form,) in world.registry.load(info.digest).modules.values():
                assert isinstance(form, SharedBasis)
        again = [world.registry.resolve(name) for name in NAMES]
        with pytest.raises(AdapterInvalid, match="compressed already"):
            await compressor.compress_jointly(again, WIDE, Bounds())


async def test_what_is_refused_leaves_every_adapter_as_it_was(world: World) -> None:
    async with service(world) as (compressor, _, _):
        sources = [world.registry.resolve(name) for name in NAMES]
        narrow = world.registry.resolve("narrow")
        cases: list[tuple[list[AdapterRef], JointRecipe, Bounds, type[CodedError], str]] = [
            ([*sources, sources[0]], WIDE, Bounds(), InvalidRequest, "duplicate_adapter"),
            (sources, JointRecipe("jd_full", rank=257), Bounds(), AdapterInvalid, "rank_limit"),
            (sources[:1], WIDE, Bounds(), AdapterInvalid, "too_few_adapters"),
            (sources, JointRecipe("jd_diag", 4, clusters=4), Bounds(), AdapterInvalid, "too_few_adapters"),
            ([*sources, narrow], WIDE, Bounds(), AdapterInvalid, "modules_differ"),
            (sources, JointRecipe("jd_diag", 1), Bounds(max_error=0.1), AdapterInvalid, "too_lossy"),
            (sources, JointRecipe("jd_full", 1), Bounds(max_divergence=1e-7), AdapterInvalid, "too_lossy"),
        ]
        for given, recipe, bounds, kind, code in cases:
            with pytest.raises(kind) as caught:
                await compressor.compress_jointly(given, recipe, bounds, probe=PROMPTS)
            assert caught.value.code == code
            assert ("`plain`" in caught.value.message) == (code in ("too_lossy", "duplicate_adapter"))
        assert [len(world.registry.versions(name)) for name in ADAPTERS] == [1] * 4


async def test_only_current_versions_are_taken(world: World) -> None:
    async with service(world) as (compressor, _, _):
        sources = [world.registry.resolve(name) for name in NAMES[:2]]
        modules = world.registry.load(sources[0].digest).modules
        world.registry.add_forms("other", modules, "upload", _told(), replace=True)
        with pytest.raises(AdapterConflict, match="`other` has another current version than 1"):
            await compressor.compress_jointly(sources, WIDE, Bounds(), probe=PROMPTS)
        assert [len(world.registry.versions(name)) for name in NAMES[:2]] == [1, 2]


async def test_a_change_during_the_measurement_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with service(world) as (compressor, _, _):
        sources = [world.registry.resolve(name) for name in NAMES[:2]]
        measured = compressor._measured

        async def meddling(*arguments: object) -> object:
            found = await measured(*arguments)  # type: ignore[arg-type]
            modules = world.registry.load(sources[0].digest).modules
            world.registry.add_forms("other", modules, "upload", _told(), replace=True)
            return found

        monkeypatch.setattr(compressor, "_measured", meddling)
        with pytest.raises(PreconditionFailed):
            await compressor.compress_jointly(sources, WIDE, Bounds(), probe=PROMPTS)
        assert [len(world.registry.versions(name)) for name in NAMES[:2]] == [1, 2]


def _told() -> dict[str, object]:
    return {"kind": "lora", "warnings": [], "provenance": {"type": "upload"}, "compression": None}


def test_over_http(world: World, tmp_path: Path) -> None:
    options = ("--adapter-dtype", "int4", "--kv-cache-memory", "8MiB", "--adapter-memory", "16MiB", "--max-rank", "32")
    with (
        ServerProcess(str(world.folder), tmp_path / "store", *options, log=tmp_path / "log") as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE) as client,
    ):
        for name in NAMES:
            folder = tmp_path / name
            files = {
                "config": (folder / "adapter_config.json").read_bytes(),
                "weights": (folder / "adapter_model.safetensors").read_bytes(),
            }
            assert client.put(f"/adapters/{name}", files=files).status_code == 201
        order = {"adapters": list(NAMES), "method": "jd_diag", "rank": 4, "clusters": 2, "probe": PROMPTS}
        refused = client.post("/compress", json=order | {"max_error": 1e-6})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "too_lossy")
        for change, status, code in (
            ({"adapters": ["plain", "plain"]}, 400, "duplicate_adapter"),
            ({"adapters": ["plain", "nobody"]}, 404, "model_not_found"),
            ({"rank": 33}, 422, "rank_limit"),
            ({"clusters": 4}, 422, "too_few_adapters"),
        ):
            answered = client.post("/compress", json=order | change)
            assert (answered.status_code, answered.json()["error"]["code"]) == (status, code)
        made = client.post("/compress", json=order | {"max_divergence": None})
        assert made.status_code == 200, made.text
        assert [(body["name"], body["version"]) for body in made.json()["adapters"]] == [(name, 2) for name in NAMES]
        body = {"inputs": PROMPTS[1], "parameters": {"max_new_tokens": 8, "details": True}}
        for name in NAMES:
            found = client.post("/generate", json=body, params={"adapter": name}).json()
            assert len(found["details"]["tokens"]) > 0
        single = client.post(
            "/adapters/plain@1/compress",
            json={"dtype": "int4", "target": "four", "probe": PROMPTS, "max_divergence": None},
        )
        assert (single.status_code, single.json()["compression"]["dtype"]) == (200, "int4")
        assert 0.03 < single.json()["compression"]["relative_error"] < 0.2
        # Stored in four bits or brought to them in memory: the same tokens and probabilities.
        tokens = [
            client.post("/generate", json=body, params={"adapter": name}).json()["details"]["tokens"]
            for name in ("plain@1", "four")
        ]
        assert tokens[0] == tokens[1]
