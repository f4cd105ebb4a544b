"""Virtual tokens and invocations through the whole engine, against PEFT in float32."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, PromptOutput, SamplingParams, StepOutput, WeightedAdapter
from server.model.base import BaseModel
from server.model.loader import describe
from tests.engine.peft_contexts import CONFIGS, Oracle
from tests.support.driver import CoreDriver, logprobs, tokens
from tests.support.models import VOCABULARY, tiny_model, tiny_tokenizer

PAGE = 12_288  # bytes of one KV block of the tiny model
ROOMY = EngineLimits(kv_cache_memory=4 << 20, adapter_memory=4 << 20, max_batch_tokens=512)
ENGINES = {
    "roomy": ROOMY,
    "short steps": EngineLimits(kv_cache_memory=4 << 20, adapter_memory=4 << 20, max_batch_tokens=7),
    "few blocks": EngineLimits(kv_cache_memory=9 * PAGE, adapter_memory=4 << 20, max_batch_tokens=32),
    "few adapters": EngineLimits(kv_cache_memory=4 << 20, adapter_memory=12 * PAGE, max_batch_tokens=64),
}
CONTEXTS = ("prompt", "p-tuning", "prefix", "projected")
INVOCATION = (7, 9, 7)
RELATIVE = 1e-4


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(tiny_model("llama"))


def base() -> BaseModel:
    return describe(tiny_model("llama"), tiny_tokenizer(), "tiny/llama")


def drive(oracle: Oracle, limits: EngineLimits = ROOMY) -> CoreDriver:
    return CoreDriver(base(), limits, oracle.weights)


@dataclass
class Asked:
    """A request that collects the logits of its prompt."""

    oracle: Oracle
    name: str | None
    prompt: tuple[int, ...]
    rows: dict[int, torch.Tensor] = field(default_factory=dict)

    def request(
        self, request_id: str, new_tokens: int = 6, *, probed: bool = True, **sampling: Any
    ) -> GenerationRequest:
        adapters: tuple[WeightedAdapter, ...] = ()
        if self.name is not None:
            weights = self.oracle.weights(self.name)
            count = 0 if weights.context is None else weights.context.num_tokens
            adapters = (WeightedAdapter(self.name, 1.0, count, weights.invocation),)
        params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, logprobs=0, **sampling)
        return GenerationRequest(request_id, self.prompt, params, adapters, probe=self._keep if probed else None)

    def check(self, outputs: Sequence[StepOutput], new_tokens: int = 6) -> None:
        """Greedy tokens and the logits of every position of the prompt are PEFT's."""
        assert outputs[-1].error is None
        found = tokens(list(outputs))
        assert found == self.oracle.greedy(self.name, self.prompt, new_tokens)
        expected = self.oracle.logits(self.name, (*self.prompt, *found), len(self.prompt))
        if self.rows:
            assert sorted(self.rows) == list(range(len(self.prompt)))
            assert (
                _apart(torch.stack([self.rows[i] for i in sorted(self.rows)]), expected[: len(self.prompt)]) < RELATIVE
            )
        steps = expected[len(self.prompt) - 1 : -1].log_softmax(dim=-1)
        assert logprobs(list(outputs)) == pytest.approx(
            [float(row[t]) for row, t in zip(steps, found, strict=True)], abs=1e-3
        )

    def _keep(self, position: int, logits: torch.Tensor) -> None:
        self.rows[position] = logits.clone()


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    chance = random.Random(seed)
    return tuple(chance.randrange(10, VOCABULARY) for _ in range(length))


def facts(outputs: Sequence[StepOutput]) -> PromptOutput:
    [found] = [output.prompt for output in outputs if output.prompt is not None]
    return found


@pytest.mark.parametrize("name", CONTEXTS)
def test_alone_equals_peft(oracle: Oracle, name: str) -> None:
    asked = Asked(oracle, name, prompt_of(1, 23))
    outputs = drive(oracle).run(asked.request("a"))
    asked.check(outputs)
    assert oracle.generate(name, asked.prompt, 6) == tokens(outputs)
    assert facts(outputs).token_ids == asked.prompt
    plain = oracle.logits(None, asked.prompt, len(asked.prompt))
    assert _apart(torch.stack([asked.rows[i] for i in sorted(asked.rows)]), plain) > 0.05


@pytest.mark.parametrize("name", ["prompt", "prefix"])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma", "gemma3_text", "mistral", "opt", "phi3"])
def test_other_architectures_equal_peft(architecture: str, name: str) -> None:
    """Learned positions, scaled embeddings, windows, keys and values that are views of one product."""
    model = tiny_model(architecture)
    asked = Asked(Oracle(model, [name]), name, prompt_of(1, 23))
    driver = CoreDriver(describe(tiny_model(architecture), tiny_tokenizer(), "tiny"), ROOMY, asked.oracle.weights)
    asked.check(driver.run(asked.request("a")))


@pytest.mark.parametrize("engine", ENGINES)
def test_batched_equals_peft(oracle: Oracle, engine: str) -> None:
    """Chunks, preemption and evictions among base, LoRA, virtual tokens and invocations, twice with warm caches."""
    driver, asked = drive(oracle, ENGINES[engine]), {}
    new_tokens = 40 if engine == "few blocks" else 6
    for turn in range(2):
        for number, name in enumerate([*CONFIGS, None]):
            prompt = prompt_of(number % 3, 9 + 5 * (number % 3))
            prompt = (*prompt, *INVOCATION, *prompt_of(number, 3))
            one = asked[f"{turn}-{number}"] = Asked(oracle, name, prompt)
            driver.add(one.request(f"{turn}-{number}", new_tokens, probed=turn == 0 and number % 2 == 0))
        driver.drain()
    for request_id, one in asked.items():
        one.check(driver.outputs[request_id], new_tokens)
    stats = driver.core.stats
    assert (stats.preemptions_total > 0) == (engine == "few blocks")
    assert (stats.adapter_evictions_total > 0) == (engine == "few adapters")
    if engine == "roomy":
        assert stats.prefix_hit_tokens_total > 0


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_second_request_finds_the_virtual_tokens_in_the_cache(oracle: Oracle, name: str) -> None:
    driver, asked = drive(oracle), Asked(oracle, name, prompt_of(2, 40))
    first = driver.run(asked.request("a", probed=False))
    again = driver.run(asked.request("b", probed=False))
    asked.check(first)
    asked.check(again)
    virtual = CONFIGS[name].num_virtual_tokens
    assert facts(first).cached_tokens == 0
    assert facts(again).cached_tokens == (40 - 1 + virtual) // 16 * 16 - virtual
    other = Asked(oracle, name, prompt_of(3, 40))
    outputs = driver.run(other.request("c", probed=False))
    other.check(outputs)
    assert facts(outputs).cached_tokens == 0
    hits = driver.core.stats.prefix_hit_tokens_total
    assert hits == facts(again).cached_tokens + virtual + virtual // 16 * 16  # whole blocks of virtual tokens


@pytest.mark.parametrize(("one", "other"), [("prompt", "prompt-2"), ("prefix", "prefix-2"), ("alora", "alora-2")])
def test_swapped_adapters_differ(oracle: Oracle, one: str, other: str) -> None:
    driver, prompt = drive(oracle), (*prompt_of(4, 20), *INVOCATION, 11)
    first, second = Asked(oracle, one, prompt), Asked(oracle, other, prompt)
    first.check(driver.run(first.request("a")))
    second.check(driver.run(second.request("b")))
    last = len(prompt) - 1
    assert _apart(first.rows[last], second.rows[last]) > 0.01


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_nobody_sees_virtual_tokens(oracle: Oracle, name: str) -> None:
    """Facts of the prompt, penalties and counts are those of the caller's own tokens."""
    driver, prompt = drive(oracle), prompt_of(5, 18)
    asked = Asked(oracle, name, prompt)
    outputs = driver.run(asked.request("a", 1, probed=False, prompt_logprobs=2))
    found, rows = facts(outputs), oracle.logits(name, prompt, len(prompt)).log_softmax(dim=-1)
    assert found.token_ids == prompt
    assert found.logprobs[0] is None
    assert found.logprobs[1:] == pytest.approx(
        [float(row[t]) for row, t in zip(rows, prompt[1:], strict=False)], abs=1e-3
    )
    assert len(found.top) == len(prompt)
    assert driver.core.stats.prompt_tokens_total == len(prompt)
    scores = rows[-1].clone()
    scores[0] = 100.0  # what stands for a virtual token: a penalty must not touch it
    punished = driver.run(asked.request("b", 1, probed=False, repetition_penalty=50.0, logit_bias={0: 100.0}))
    assert tokens(punished) == [int(scores.argmax())]


PLACES = {
    "once": (*prompt_of(6, 20), *INVOCATION, *prompt_of(7, 5)),
    "first": (*INVOCATION, *prompt_of(6, 12)),
    "last": (*prompt_of(6, 17), *INVOCATION),
    "several times": (*INVOCATION, *prompt_of(6, 20), *INVOCATION, *prompt_of(7, 18), *INVOCATION, 30),
    "overlapping": (*prompt_of(6, 8), 7, 9, 7, 9, 7, 12),
    "nowhere": (*prompt_of(6, 20), 7, 9),
}


@pytest.mark.parametrize("engine", ["roomy", "short steps"])
@pytest.mark.parametrize("place", PLACES)
def test_an_invoked_adapter_equals_peft(oracle: Oracle, place: str, engine: str) -> None:
    driver, asked = drive(oracle, ENGINES[engine]), Asked(oracle, "alora", PLACES[place])
    outputs = driver.run(asked.request("a"))
    asked.check(outputs)
    assert oracle.generate("alora", asked.prompt, 6) == tokens(outputs)


def test_blocks_before_the_invocation_are_shared_with_the_base(oracle: Oracle) -> None:
    driver, prompt = drive(oracle), (*prompt_of(8, 37), *INVOCATION, *prompt_of(9, 12))
    asked = [Asked(oracle, name, prompt) for name in (None, "alora", "alora-2", "alora", None)]
    cached = []
    for number, one in enumerate(asked):
        outputs = driver.run(one.request(str(number), probed=False))
        one.check(outputs)
        cached.append(facts(outputs).cached_tokens)
    assert cached == [0, 32, 32, 48, 48]


def test_a_request_that_does_not_know_of_virtual_tokens_fails_alone(oracle: Oracle) -> None:
    """A wrong manifest must not give wrong answers."""
    driver, prompt = drive(oracle), prompt_of(10, 12)
    params = SamplingParams(max_tokens=2, temperature=0)
    driver.add(GenerationRequest("bad", prompt, params, (WeightedAdapter("prefix"),)))
    good = Asked(oracle, None, prompt)
    driver.add(good.request("good"))
    driver.drain()
    assert driver.outputs["bad"][-1].error is not None
    good.check(driver.outputs["good"])
