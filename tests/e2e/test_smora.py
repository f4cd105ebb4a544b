"""SMoRA adapters through the whole service, in one batch with LoRAs and base traffic: token for token as the authors'
formula says."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from tests.e2e.world import World, build_world
from tests.support import smora
from tests.support.driver import CoreDriver, tokens
from tests.support.greedy import greedy
from tests.support.models import VOCABULARY, tiny_model
from tests.support.server_process import ServerProcess

LORAS = {"plain": {"r": 8, "lora_alpha": 16}}
SMORAS: dict[str, dict[str, Any]] = {
    "experts": {"r": 16, "activate_r": 4},
    "shared": {"r": 6, "activate_r": 4, "rank_partition": 2, "targets": (*smora.TARGETS, "up_proj", "o_proj")},
    "one": {"r": 5, "activate_r": 1, "alpha": 3.0},
}
LIMITS = EngineLimits(kv_cache_memory=8 << 20, adapter_memory=16 << 20, max_batch_tokens=23)
NEW_TOKENS = 10
Weighted = tuple[tuple[str, float], ...]


class Oracle:
    """Greedy answers of the base with SMoRA adapters, or with one LoRA, one prompt at a time."""

    def __init__(self, world: World, folders: dict[str, Path]) -> None:
        self.base = tiny_model("llama")
        self.world = world
        self.folders = folders

    def greedy(self, prompt: list[int], adapters: Weighted) -> list[int]:
        if adapters and adapters[0][0] in LORAS:
            return self.world.oracle.greedy(prompt, adapters, NEW_TOKENS)[0]
        model = smora.adapted(self.base, *((self.folders[name], weight) for name, weight in adapters))
        return greedy(model, prompt, NEW_TOKENS)[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), "llama", LORAS)


@pytest.fixture(scope="module")
def folders(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("smora")
    base = tiny_model("llama")
    return {name: smora.make(base, root / name, seed=seed, **o) for seed, (name, o) in enumerate(SMORAS.items())}


@pytest.fixture(scope="module")
def digests(world: World, folders: dict[str, Path]) -> dict[str, str]:
    found = dict(world.digests)
    for name, folder in folders.items():
        config, weights = (folder / "adapter_config.json").read_bytes(), folder / "adapter_model.safetensors"
        found[name] = world.registry.add(name, config, weights)[0].digest
    return found


def prompt_of(number: int) -> list[int]:
    return [(7 * number + 13 * place) % (VOCABULARY - 3) + 3 for place in range(6 + 3 * number)]


def test_one_batch_of_every_kind(world: World, folders: dict[str, Path], digests: dict[str, str]) -> None:
    orders: list[Weighted] = [
        (("experts", 1.0),),
        (("shared", 1.0),),
        (("one", 1.0),),
        (("plain", 1.0),),
        (),
        (("experts", 0.7), ("shared", -0.4)),
        (("experts", 1.0),),
    ]
    oracle = Oracle(world, folders)
    expected = [oracle.greedy(prompt_of(number), order) for number, order in enumerate(orders)]
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    driver = CoreDriver(world.base(), LIMITS, world.registry.load)
    for number, order in enumerate(orders):
        weighted = tuple(WeightedAdapter(digests[name], weight) for name, weight in order)
        driver.add(GenerationRequest(str(number), tuple(prompt_of(number)), params, weighted))
    driver.drain()
    assert [tokens(driver.outputs[str(number)]) for number in range(len(orders))] == expected
    for number, order in enumerate(orders):
        if order:
            assert expected[number] != oracle.greedy(prompt_of(number), ()), "an adapter that changes nothing"

    loads = driver.core.experts.read(digests["experts"])
    seen = sum(len(prompt_of(number)) + NEW_TOKENS - 1 for number in (0, 5, 6))
    assert len(loads) == 3 * len(smora.TARGETS)
    assert {load.tokens for load in loads.values()} == {seen}
    assert {(load.active, len(load.counts)) for load in loads.values()} == {(4, 16)}
    assert driver.core.experts.read(digests["plain"]) == {}
    assert driver.core.stats.gated_adapters_resident == 3
    assert {digest for digest, _ in driver.core.stats.expert_entropies} == {digests[name] for name in SMORAS}


def test_counts_begin_anew_after_an_eviction(world: World, digests: dict[str, str]) -> None:
    driver = CoreDriver(world.base(), LIMITS, world.registry.load)
    params = SamplingParams(max_tokens=1, temperature=0)
    for name in ("again", "and again"):
        driver.run(GenerationRequest(name, tuple(prompt_of(1)), params, (WeightedAdapter(digests["one"]),)))
        assert {load.tokens for load in driver.core.experts.read(digests["one"]).values()} == {len(prompt_of(1))}
        driver.core.discard(digests["one"])
        assert driver.core.experts.read(digests["one"]) == {}


def generate(client: httpx.Client, text: str, name: str | None) -> list[int]:
    body = {"inputs": text, "parameters": {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "details": True}}
    answer = client.post("/generate", json=body, params={"adapter": name} if name else {})
    assert answer.status_code == 200, answer.text
    return [token["id"] for token in answer.json()["details"]["tokens"]]


def uploaded(folder: Path) -> dict[str, bytes]:
    return {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }


def test_by_http(world: World, folders: dict[str, Path], tmp_path: Path) -> None:
    oracle = Oracle(world, folders)
    names = ["experts", "shared", None, "experts", "one"]
    texts = ["the first", "one base model, many adapters", "no adapter", "experts are ranks", "a token"]
    encode = world.base().tokenizer
    prompts = [encode(text).input_ids for text in texts]
    expected = [
        oracle.greedy(prompt, ((name, 1.0),) if name else ()) for prompt, name in zip(prompts, names, strict=True)
    ]
    server = ServerProcess(str(world.folder), tmp_path / "store", "--no-compile", log=tmp_path / "log")
    with server, httpx.Client(base_url=server.url, timeout=120) as client:
        for name, folder in folders.items():
            files = uploaded(folder)
            answer = client.put(f"/adapters/{name}", files=files)
            assert answer.status_code == 201, answer.text
            assert (answer.json()["kind"], answer.json()["forms"]) == ("smora", ["gated_low_rank"])
            for part, file in (("config", "adapter_config.json"), ("weights", "adapter_model.safetensors")):
                assert client.get(f"/adapters/{name}/files/{file}").content == files[part]
        assert generate(client, texts[0], "experts") == expected[0]
        with ThreadPoolExecutor(len(names)) as pool:
            together = list(pool.map(lambda n: generate(client, texts[n], names[n]), range(len(names))))
        assert together == expected

        told = client.get("/adapters/experts/experts").json()
        assert (told["gated"], told["residency"]) == (True, "resident")
        # alone, and twice in the batch; a prompt whose beginning is still in the cache counts only what was computed
        least = len(prompts[0]) + len(prompts[3]) + 3 * (NEW_TOKENS - 1)
        assert least <= told["tokens"] <= least + len(prompts[0])
        for module in told["modules"].values():
            assert sum(module["shares"]) == pytest.approx(1)
            assert 0 < module["entropy"] <= 1
        assert 'polyrank_expert_load_entropy{adapter="' in client.get("/metrics").text

        files = uploaded(folders["one"])
        files["config"] = files["config"].replace(b'"activate_r": 1', b'"activate_r": 6')
        bad = client.put("/adapters/bad", files=files)
        assert (bad.status_code, bad.json()["error"]["code"]) == (422, "bad_config")
