"""Compressed adapters through the whole service: measured, refused or stored, and served in 8 bits."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.compression.recipe import Bounds, Recipe
from adapters_store.errors import AdapterConflict, AdapterInvalid
from adapters_store.formats import peft
from adapters_store.forms import AdapterWeights, LowRank
from server.compressor import Compressor
from server.divergence import MAX_TOKENS, Divergence, measure
from server.engine.async_engine import AsyncEngine
from server.engine.build import build_engine
from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.errors import ContextTooLong
from server.trials import Trials
from tests.e2e.world import World, build_world
from tests.support.server_process import ServerProcess

LIMITS = EngineLimits(kv_cache_memory=8 << 20, adapter_memory=16 << 20, max_batch_tokens=64)
ADAPTERS = {"plain": {"r": 8, "lora_alpha": 16}, "other": {"r": 4, "lora_alpha": 8}}
PROMPTS = ["the adapter answers", "one base model, many adapters, one batch"]
PATIENCE = 300  # seconds until a test that hangs is failed; no test waits for it


@pytest.fixture
def world(tmp_path: Path) -> World:
    return build_world(tmp_path, "llama", ADAPTERS)


@asynccontextmanager
async def service(world: World) -> AsyncIterator[tuple[Compressor, AsyncEngine, Trials]]:
    trials = Trials(world.registry.load)
    engine = build_engine(world.base(), LIMITS, trials.load)
    async with asyncio.timeout(PATIENCE):
        engine.start()
        try:
            yield Compressor(world.registry, engine, trials), engine, trials
            assert not trials._weights
        finally:
            await engine.stop()


async def answer(engine: AsyncEngine, digest: str) -> list[int]:
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    request = GenerationRequest(f"r{digest[:8]}", PROMPTS[1], params, (WeightedAdapter(digest),))
    return [output.token_id async for output in await engine.submit(request) if output.token_id is not None]


async def test_int8_becomes_the_next_version(world: World) -> None:
    async with service(world) as (compressor, engine, _):
        source = world.registry.resolve("plain")
        info, created, errors = await compressor.compress(source, Recipe(), Bounds(0.02, 0.01), probe=PROMPTS)
        assert (created, info.name, info.version, info.event) == (True, "plain", 2, "compress")
        assert info.provenance == {"type": "compress", "source": source.digest, "method": "int8", "parameters": {}}
        told = info.compression
        assert told is not None
        assert 0.002 < told["relative_error"] < 0.02
        assert errors[told["worst_module"]["name"]] == max(errors.values())
        assert errors.keys() == world.registry.load(source.digest).modules.keys()
        assert 0 < told["divergence"]["mean_kl"] <= told["divergence"]["max_kl"] < 0.1
        assert told["divergence"]["same_greedy"] > 0.8
        assert await answer(engine, info.digest) == await answer(engine, source.digest)
        for forms in world.registry.load(info.digest).modules.values():
            assert all(isinstance(form, LowRank) and form.a.dtype == torch.int8 for form in forms)


async def test_what_is_too_lossy_is_not_stored(world: World) -> None:
    async with service(world) as (compressor, _, _):
        source = world.registry.resolve("plain")
        for bounds, param in ((Bounds(max_error=0.1), "max_error"), (Bounds(max_divergence=1e-6), "max_divergence")):
            with pytest.raises(AdapterInvalid) as caught:
                await compressor.compress(source, Recipe(rank=1), bounds, probe=PROMPTS)
            assert (caught.value.status, caught.value.code, caught.value.param) == (422, "too_lossy", param)
        assert len(world.registry.versions("plain")) == 1


async def test_an_adapter_whose_output_is_no_numbers_cannot_be_measured(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    weights = {name: tensor.float() * 1e25 for name, tensor in load_file(folder / peft.WEIGHTS_FILE).items()}
    save_file(weights, tmp_path / "wild")
    world.registry.add("wild", (folder / peft.CONFIG_FILE).read_bytes(), tmp_path / "wild")
    async with service(world) as (compressor, _, _):
        with pytest.raises(AdapterInvalid) as caught:
            await compressor.compress(world.registry.resolve("wild"), Recipe(), Bounds(None, None), probe=PROMPTS)
        assert (caught.value.status, caught.value.code) == (422, "model_output_invalid")
        assert len(world.registry.versions("wild")) == 1


async def test_targets(world: World) -> None:
    async with service(world) as (compressor, engine, _):
        source, other = world.registry.resolve("plain"), world.registry.resolve("other")
        new, _, _ = await compressor.compress(source, Recipe("native", energy=0.9), Bounds(), target="small")
        assert (new.name, new.version, new.provenance["method"]) == ("small", 1, "truncate")
        again, created, _ = await compressor.compress(source, Recipe("native", energy=0.9), Bounds(), target="small")
        assert (again.digest, created) == (new.digest, False)
        steps = engine.stats().steps_total
        with pytest.raises(AdapterConflict):
            await compressor.compress(source, Recipe(), Bounds(), target="other")
        assert engine.stats().steps_total == steps, "a conflict must be found before anything is measured"
        replaced, _, _ = await compressor.compress(source, Recipe(), Bounds(), target="other", replace=True)
        assert (replaced.name, replaced.version) == ("other", 2)
        with pytest.raises(AdapterConflict, match="another current version than 1"):
            await compressor.compress(other, Recipe(), Bounds())
        with pytest.raises(AdapterInvalid) as caught:
            await compressor.compress(world.registry.resolve("other"), Recipe(), Bounds())
        assert caught.value.code == "already_compressed"
        back, _, _ = await compressor.compress(other, Recipe(), Bounds(), replace=True)
        assert (back.version, back.provenance["source"]) == (3, other.digest)


async def test_divergence_is_that_of_the_distributions(world: World) -> None:
    """Against transformers and PEFT, whose log probabilities the oracle gives."""
    async with service(world) as (_, engine, _):
        names = ("plain", "other")
        found = await measure(engine, PROMPTS, world.digests["plain"], world.digests["other"], "public")
        kl, same = [], []
        for prompt in PROMPTS:
            tokens = engine.tokenizer.encode(prompt)
            p, q = (world.oracle.logprobs(tokens, ((name, 1.0),)).double() for name in names)
            kl.append((p.exp() * (p - q)).sum(dim=-1))
            same.append(p.argmax(dim=-1) == q.argmax(dim=-1))
        every, equal = torch.cat(kl), torch.cat(same).double()
        expected = Divergence(float(every.mean()), float(every.max()), float(equal.mean()), len(every))
        assert found.positions == expected.positions
        assert found.same_greedy == expected.same_greedy
        assert found.mean_kl == pytest.approx(expected.mean_kl, rel=1e-3)
        assert found.max_kl == pytest.approx(expected.max_kl, rel=1e-3)
        itself = await measure(engine, PROMPTS, world.digests["plain"], world.digests["plain"], "public")
        assert (itself.mean_kl, itself.max_kl, itself.same_greedy) == (0.0, 0.0, 1.0)


async def test_long_prompts_count_by_their_end_and_errors_are_told(world: World) -> None:
    async with service(world) as (_, engine, _):
        digest = world.digests["plain"]
        assert (await measure(engine, ["a b c " * 60], digest, digest, "public")).positions <= MAX_TOKENS
        engine.info = replace(engine.info, max_context=4)
        with pytest.raises(ContextTooLong):
            await measure(engine, PROMPTS, digest, digest, "public")


class Discarded:
    """An engine that remembers what it was told to discard."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def discard(self, digest: str) -> None:
        self.digests.append(digest)


def test_trials_come_before_the_store_and_go() -> None:
    stored = AdapterWeights("s", {})
    trials, discarded = Trials(lambda _: stored), Discarded()
    with trials.on_trial(discarded, AdapterWeights("x", {"m": ()})) as digest:
        assert trials.load(digest) == AdapterWeights(digest, {"m": ()})
        assert trials.load("s") is stored
        assert discarded.digests == []
    assert trials.load(digest) is stored
    assert discarded.digests == [digest]


def test_adapters_in_eight_bits_over_http(world: World, tmp_path: Path) -> None:
    """`--adapter-dtype int8` changes what is in memory, not what is stored, nor what errors are measured against."""
    given = tmp_path / "plain"
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = {part: (given / name).read_bytes() for part, name in zip(("config", "weights"), names, strict=True)}
    options = ("--adapter-dtype", "int8", "--kv-cache-memory", "8MiB", "--adapter-memory", "16MiB")
    with (
        ServerProcess(str(world.folder), tmp_path / "store", *options, log=tmp_path / "log") as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE) as client,
    ):
        assert client.put("/adapters/plain", files=files).status_code == 201
        assert client.get(f"/adapters/plain/files/{names[1]}").content == files["weights"]
        body = {"inputs": PROMPTS[1], "parameters": {"max_new_tokens": 8, "details": True, "adapter_id": "plain"}}
        native = client.post("/generate", json=body).json()["details"]["tokens"]
        assert client.post("/adapters/plain/compress", json={"max_error": 1e-6}).json()["error"]["code"] == "too_lossy"
        made = client.post("/adapters/plain/compress", json={"probe": PROMPTS})
        assert (made.status_code, made.json()["version"]) == (200, 2)
        assert made.json()["compression"]["divergence"]["mean_kl"] > 0
        # Stored in eight bits or brought to them in memory: the same factors, so the same tokens and probabilities.
        assert client.post("/generate", json=body).json()["details"]["tokens"] == native
        exported = client.get(f"/adapters/plain/files/{names[1]}").content
        assert len(exported) > made.json()["bytes"]


@pytest.mark.parametrize(
    "facts", [{"knobs": {"rank": {"max": 8}}}, {"virtual_tokens": 4}, {"invocation": (3, 1)}], ids=str
)
async def test_what_would_be_lost_is_refused(world: World, facts: dict[str, Any]) -> None:
    async with service(world) as (compressor, _, _):
        source = replace(world.registry.resolve("plain"), **facts)
        with pytest.raises(AdapterInvalid) as caught:
            await compressor.compress(source, Recipe(), Bounds())
        assert (caught.value.code, caught.value.param) == ("feature_unsupported", "adapter")
    assert world.registry.resolve("plain").version == 1
