"""Batched equals alone equals Hugging Face and PEFT, token for token in float32, whatever a batch mixes."""

import random
from dataclasses import dataclass

import pytest
import torch

from adapters_store.forms import AdapterWeights
from server.engine.limits import EngineLimits
from server.engine.request import FinishReason, GenerationRequest, SamplingParams, WeightedAdapter
from tests.e2e.world import ADAPTERS, World, build_world
from tests.support.driver import CoreDriver, logprobs, tokens
from tests.support.models import EOS_ID, VOCABULARY

BATCHES_PER_ENGINE = 40
NUM_CASES = 90
TOLERANCE = 1e-3  # of log probabilities; measured differences are near 1e-5
PAGE = 12_288  # bytes of one KV block of the tiny model

ROOMY = EngineLimits(kv_cache_memory=8 << 20, adapter_memory=64 << 20, max_batch_tokens=512)
ENGINES = {
    "roomy": ROOMY,
    "short steps": EngineLimits(kv_cache_memory=8 << 20, adapter_memory=64 << 20, max_batch_tokens=7),
    "few blocks": EngineLimits(kv_cache_memory=11 * PAGE, adapter_memory=64 << 20, max_batch_tokens=32),
    "few adapters": EngineLimits(kv_cache_memory=8 << 20, adapter_memory=32 * PAGE, max_batch_tokens=64),
    "all scarce": EngineLimits(kv_cache_memory=10 * PAGE, adapter_memory=32 * PAGE, max_batch_tokens=19, max_running=5),
    "one budget": EngineLimits(
        kv_cache_memory=9 * PAGE,
        adapter_memory=12 * PAGE,
        device_memory=44 * PAGE,
        host_adapter_memory=24 * PAGE,
        max_batch_tokens=64,
    ),
}


@dataclass(frozen=True)
class Case:
    """A request and its answer by the oracle."""

    prompt: tuple[int, ...]
    adapters: tuple[tuple[str, float], ...]
    new_tokens: int
    expected: tuple[int, ...]
    logprobs: tuple[float, ...]

    def request(self, world: World, request_id: str) -> GenerationRequest:
        adapters = tuple(WeightedAdapter(world.digests[name], weight) for name, weight in self.adapters)
        sampling = SamplingParams(max_tokens=self.new_tokens, temperature=0, logprobs=0)
        return GenerationRequest(request_id, self.prompt, sampling, adapters)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), "llama", ADAPTERS, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def cases(world: World) -> list[Case]:
    """Prompts with shared beginnings under base, single and weighted adapters, each answered by the oracle."""
    chance = random.Random(20261123)
    prefixes = [[chance.randrange(3, VOCABULARY) for _ in range(length)] for length in (0, 5, 16, 33, 48)]
    made = []
    for _ in range(NUM_CASES):
        prompt = (*chance.choice(prefixes), *(chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 30))))
        count = chance.choice((0, 1, 1, 1, 2))
        single = count == 1
        names = chance.sample(sorted(ADAPTERS if single else ADAPTERS.keys() - {"own-head"}), count)
        adapters = tuple((name, 1.0 if single else chance.choice((0.7, -0.4, 1.3))) for name in names)
        new_tokens = chance.choice((2, 4, 7, 12, 40))  # the long ones outgrow their blocks and force preemption
        expected, logs = world.oracle.greedy(prompt, adapters, new_tokens, (EOS_ID,))
        made.append(Case(prompt, adapters, new_tokens, tuple(expected), tuple(logs)))
    return made


def test_adapters_and_base_answer_differently(world: World, cases: list[Case]) -> None:
    """Without this the exactness below would prove nothing."""
    adapted = [case for case in cases if case.adapters]
    same = sum(
        world.oracle.greedy(case.prompt, (), case.new_tokens, (EOS_ID,))[0] == list(case.expected) for case in adapted
    )
    assert same < len(adapted) / 4


def test_alone_equals_peft(world: World, cases: list[Case]) -> None:
    driver = CoreDriver(world.base(), ROOMY, world.registry.load)
    for number, case in enumerate(cases):
        outputs = driver.run(case.request(world, f"alone-{number}"))
        assert tuple(tokens(outputs)) == case.expected, case
        assert logprobs(outputs) == pytest.approx(case.logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("name", ENGINES)
def test_mixed_batches_equal_peft(world: World, cases: list[Case], name: str) -> None:
    _check_batches(world, cases, name, BATCHES_PER_ENGINE)


@pytest.mark.deep
@pytest.mark.parametrize("name", ENGINES)
def test_many_mixed_batches_equal_peft(world: World, cases: list[Case], name: str) -> None:
    _check_batches(world, cases, name, 4000)


def _check_batches(world: World, cases: list[Case], name: str, batches: int) -> None:
    """Random arrivals and cancels over the same cases; every answer that was not cancelled is the oracle's."""
    driver = CoreDriver(world.base(), ENGINES[name], world.registry.load)
    chance = random.Random(name)
    checked = cancelled = 0
    for batch in range(batches):
        live = _run_batch(driver, world, chance, [f"{batch}-{i}" for i in range(chance.randint(3, 9))], cases)
        for request_id, case in live.items():
            outputs = driver.outputs[request_id]
            if outputs[-1].finish_reason is FinishReason.ABORT:
                cancelled += 1
                assert tokens(outputs) == list(case.expected[: len(tokens(outputs))])
                continue
            assert outputs[-1].error is None
            assert tuple(tokens(outputs)) == case.expected, case
            assert logprobs(outputs) == pytest.approx(case.logprobs, abs=TOLERANCE)
            checked += 1
    driver.core.publish()
    stats = driver.core.stats
    assert checked > batches * 3
    assert cancelled > 0
    assert stats.prefix_hit_tokens_total > 0
    assert name == "one budget" or (stats.preemptions_total > 0) == (name in ("few blocks", "all scarce"))
    assert (stats.adapter_evictions_total > 0) == (name in ("few adapters", "all scarce", "one budget"))
    assert (stats.kv_blocks_lent > 0) == (name == "one budget")
    assert stats.host_hits_total > 0 or stats.adapter_evictions_total == 0, "what was evicted comes back from the host"
    assert stats.running == stats.waiting == 0


def test_two_adapters_of_swapped_content_are_noticed(world: World, cases: list[Case]) -> None:
    """The comparison itself fails when adapters are exchanged."""
    swapped = dict(
        zip(world.digests.values(), [*list(world.digests.values())[1:], *world.digests.values()], strict=False)
    )
    driver = CoreDriver(world.base(), ROOMY, lambda digest: _renamed(world, swapped[digest], digest))
    single = [case for case in cases if len(case.adapters) == 1]
    wrong = sum(
        tuple(tokens(driver.run(case.request(world, f"swapped-{n}")))) != case.expected for n, case in enumerate(single)
    )
    assert wrong > len(single) / 2


def _renamed(world: World, digest: str, name: str) -> AdapterWeights:
    return AdapterWeights(name, world.registry.load(digest).modules)


def _run_batch(
    driver: CoreDriver, world: World, chance: random.Random, ids: list[str], cases: list[Case]
) -> dict[str, Case]:
    chosen = {request_id: chance.choice(cases) for request_id in ids}
    pending = list(ids)
    doomed = [request_id for request_id in ids if chance.random() < 0.12]
    while pending or driver.core.has_work:
        while pending and (chance.random() < 0.6 or not driver.core.has_work):
            request_id = pending.pop()
            driver.add(chosen[request_id].request(world, request_id))
        driver.step()
        if doomed and chance.random() < 0.3:
            request_id = doomed.pop()
            if request_id not in pending:
                driver.abort(request_id)
    return chosen


def test_a_second_architecture_with_conv1d(tmp_path_factory: pytest.TempPathFactory) -> None:
    """GPT-2 keeps its weights transposed (Conv1D); one mixed batch per adapter pair."""
    torch.manual_seed(0)
    targets = ["c_attn", "c_proj", "c_fc"]
    adapters = {
        "one": {"r": 4, "lora_alpha": 8, "target_modules": targets, "fan_in_fan_out": True},
        "two": {"r": 9, "lora_alpha": 9, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    }
    world = build_world(tmp_path_factory.mktemp("gpt2"), "gpt2", adapters)
    driver = CoreDriver(world.base(), EngineLimits(max_batch_tokens=11, kv_cache_memory=8 << 20), world.registry.load)
    chance = random.Random(5)
    made = []
    for choice in ((), (("one", 1.0),), (("two", 1.0),), (("one", 0.5), ("two", -1.5))):
        for _ in range(3):
            prompt = tuple(chance.randrange(3, VOCABULARY) for _ in range(chance.randint(2, 30)))
            expected, logs = world.oracle.greedy(prompt, choice, 8, (EOS_ID,))
            made.append(Case(prompt, choice, 8, tuple(expected), tuple(logs)))
    for number, case in enumerate(made):
        driver.add(case.request(world, str(number)))
    driver.drain()
    for number, case in enumerate(made):
        assert tuple(tokens(driver.outputs[str(number)])) == case.expected
        assert logprobs(driver.outputs[str(number)]) == pytest.approx(case.logprobs, abs=TOLERANCE)
