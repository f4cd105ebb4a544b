"""Adapters in every form they are kept in, in one batch: each answers as alone, and as PEFT with what was exported."""

import random
from pathlib import Path

import pytest
import torch

from adapters_store.compression.jointly import JointMethod, JointRecipe, compress_jointly
from adapters_store.compression.recipe import Recipe, compress, in_memory
from adapters_store.forms import Delta, Int4LowRank, LowRank, MadeForms, SharedBasis
from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.model.quantize import CHOICES
from tests.e2e.world import World, build_world
from tests.support.driver import CoreDriver, logprobs, tokens
from tests.support.models import EOS_ID, VOCABULARY, tiny_model
from tests.support.peft_oracle import ALL_LINEAR, PeftOracle

TOLERANCE = 1e-3  # of log probabilities, as in `test_exactness`: every form is exact once it is multiplied out
LIMITS = EngineLimits(kv_cache_memory=8 << 20, adapter_memory=64 << 20, max_batch_tokens=23)
ENDS = [*ALL_LINEAR, "embed_tokens"]
ADAPTERS = {f"{kind}{n}": {"r": 4 + 3 * n, "lora_alpha": 16, "target_modules": ENDS} for kind in "nef" for n in (0, 1)}
ADAPTERS |= {f"{kind}{n}": {"r": 6, "lora_alpha": 12, "target_modules": ENDS} for kind in "sd" for n in (0, 1)}
JOINT: dict[str, JointMethod] = {"s": "jd_full", "d": "jd_diag"}
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """n: as uploaded; e: eight bits; f: four; s: full cores; d: diagonal ones. The oracle has the exported folders."""
    world = build_world(tmp_path_factory.mktemp("world"), "llama", ADAPTERS, tie_word_embeddings=False)
    registry, digests = world.registry, dict(world.digests)
    for name in ("e0", "e1", "f0", "f1"):
        recipe = Recipe("int8" if name[0] == "e" else "int4")
        made = compress(registry.load(digests[name]), recipe, registry.base.embeddings).modules
        digests[name] = registry.add_forms(name, made, "compress", told(), replace=True)[0].digest
    for kind, method in JOINT.items():
        names = [f"{kind}0", f"{kind}1"]
        members = compress_jointly([registry.load(digests[name]) for name in names], JointRecipe(method, rank=9))
        forms = [
            MadeForms(name, member.made.modules, told(), digests[name])
            for name, member in zip(names, members, strict=True)
        ]
        digests |= {info.name: info.digest for info, _ in registry.add_collection(forms, "compress")}
    folders = {name: exported(world, name, tmp_path_factory.mktemp(name)) for name in digests}
    return World(world.folder, registry, digests, PeftOracle(tiny_model("llama", tie_word_embeddings=False), folders))


def told() -> dict[str, object]:
    return {"kind": "lora", "warnings": [], "provenance": {"type": "compress"}, "compression": {}}


def exported(world: World, name: str, folder: Path) -> Path:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).write_bytes(b"".join(world.registry.open_file(name, file)[1]))
    return folder


def request(world: World, name: str, adapters: tuple[tuple[str, float], ...]) -> GenerationRequest:
    chance = random.Random(name)
    prompt = tuple(chance.randrange(3, VOCABULARY) for _ in range(chance.randint(4, 30)))
    weighted = tuple(WeightedAdapter(world.digests[adapter], weight) for adapter, weight in adapters)
    return GenerationRequest(name, prompt, SamplingParams(max_tokens=NEW_TOKENS, temperature=0, logprobs=0), weighted)


def orders(world: World) -> dict[str, tuple[tuple[str, float], ...]]:
    found = {name: ((name, 1.0),) for name in world.digests}
    return {**found, "mixed": (("f0", 0.7), ("s0", -0.4), ("d1", 1.3)), "also": (("e1", 0.5), ("s1", 1.5)), "base": ()}


def test_every_form_is_there(world: World) -> None:
    kinds = {"n": LowRank, "e": LowRank, "f": Int4LowRank, "s": SharedBasis, "d": SharedBasis}
    for name, digest in world.digests.items():
        modules = world.registry.load(digest).modules
        assert len(modules) == 7 * 3 + 1
        for module, (form,) in modules.items():
            assert isinstance(form, LowRank if (name[0], module) == ("f", "model.embed_tokens") else kinds[name[0]])
            assert isinstance(form, Delta)


def test_one_batch_of_all_forms_is_peft(world: World) -> None:
    driver, chosen = CoreDriver(world.base(), LIMITS, world.registry.load), orders(world)
    for name, adapters in chosen.items():
        driver.add(request(world, name, adapters))
    driver.drain()
    answers = set()
    for name, adapters in chosen.items():
        asked, outputs = request(world, name, adapters), driver.outputs[name]
        assert not isinstance(asked.prompt, str)
        expected, logs = world.oracle.greedy(asked.prompt, adapters, NEW_TOKENS, (EOS_ID,))
        assert tokens(outputs) == expected, name
        assert logprobs(outputs) == pytest.approx(logs, abs=TOLERANCE), name
        answers.add(tuple(expected))
    assert len(answers) > len(chosen) / 2
    swapped = {"s0": "s1", "d0": "d1", "f0": "f1", "e0": "e1"}
    for name, other in swapped.items():
        found = driver.run(request(world, f"{name} swapped", ((other, 1.0),)))
        own = request(world, f"{name} swapped", ()).prompt
        logs = world.oracle.greedy(own, ((name, 1.0),), NEW_TOKENS, (EOS_ID,))[1]  # type: ignore[arg-type]
        assert logprobs(found) != pytest.approx(logs, abs=TOLERANCE), "a swapped adapter goes unnoticed"


@pytest.mark.parametrize("quantization", CHOICES)
def test_batched_is_alone_bit_for_bit(world: World, quantization: str) -> None:
    """A roomy step, so that every prompt is one chunk in both."""
    limits = EngineLimits(kv_cache_memory=8 << 20, adapter_memory=64 << 20)
    driver, chosen = CoreDriver(world.base(), limits, world.registry.load, quantization), orders(world)
    for name, adapters in chosen.items():
        driver.add(request(world, name, adapters))
    driver.drain()
    together = {name: (tokens(driver.outputs[name]), logprobs(driver.outputs[name])) for name in chosen}
    for name, adapters in chosen.items():
        alone = CoreDriver(world.base(), limits, world.registry.load, quantization)
        outputs = alone.run(request(world, name, adapters))
        alone.core.close()
        assert (tokens(outputs), logprobs(outputs)) == together[name], name


def test_four_bits_in_memory_are_those_that_are_stored(world: World) -> None:
    source = world.registry.versions("f0")[-1].digest
    small = in_memory(world.registry.load(source), "int4", world.registry.base.embeddings)
    stored = world.registry.load(world.digests["f0"]).modules
    for name, (form,) in small.modules.items():
        own, again = form, stored[name][0]
        assert isinstance(own, Delta)
        assert isinstance(again, Delta)
        assert torch.equal(own.widened().a, again.widened().a)
        assert torch.equal(own.widened().b, again.widened().b)
