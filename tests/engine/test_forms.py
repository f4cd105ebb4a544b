"""Adapters of every form through the engine: right against a dense model, and the same alone as in a batch."""

import functools
from collections.abc import Sequence

import pytest
import torch

from adapters_store.forms import AdapterWeights
from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, StepOutput
from server.model.base import BaseModel
from server.model.loader import describe
from tests.engine.support import weighted
from tests.support import dense_forms
from tests.support.driver import CoreDriver, logprobs, tokens
from tests.support.form_models import KINDS, forms
from tests.support.models import tiny_model, tiny_tokenizer

MODEL = "llama"
LIMITS = EngineLimits(kv_cache_memory=1 << 20, adapter_memory=1 << 22, max_batch_tokens=48, max_running=16)
TIGHT = EngineLimits(kv_cache_memory=110_000, adapter_memory=1 << 22, max_batch_tokens=48, max_running=16)
Adapters = tuple[tuple[str, float], ...]
EACH: list[Adapters] = [(), *(((kind, 1.0),) for kind in KINDS)]
MIXED: list[Adapters] = [(("scale", 0.5), ("several", 0.75)), (("transform", 0.5), ("ia3", 0.5), ("gated", 1.0))]


def base() -> BaseModel:
    return describe(tiny_model(MODEL), tiny_tokenizer(), "tiny/llama")


@functools.cache
def adapters() -> dict[str, AdapterWeights]:
    """One of each kind, made ahead: the engine loads on several threads, which share torch's random numbers."""
    spec = base().spec
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {kind: AdapterWeights(kind, forms(kind, spec)) for kind in KINDS}


def load(digest: str) -> AdapterWeights:
    return adapters()[digest]


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def request(
    index: int, wanted: Adapters, given: tuple[int, ...] | None = None, max_tokens: int = 6
) -> GenerationRequest:
    own = given or prompt(7 + 5 * (index % 4), index)
    greedy = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=1)
    return GenerationRequest(f"{index}", own, greedy, weighted(wanted), tenant="tenant")


def together(driver: CoreDriver, requests: Sequence[GenerationRequest]) -> list[list[StepOutput]]:
    for each in requests:
        driver.add(each)
    driver.drain()
    return [driver.outputs[each.request_id] for each in requests]


@pytest.fixture(scope="module")
def driver() -> CoreDriver:
    adapters()
    return CoreDriver(base(), LIMITS, load)


def test_every_form_in_one_batch_equals_the_dense_model(driver: CoreDriver) -> None:
    requests = [request(index, wanted) for index, wanted in enumerate(EACH)]
    for each, outputs in zip(requests, together(driver, requests), strict=True):
        kinds = [adapter.digest for adapter in each.adapters]
        weights = load(kinds[0]) if kinds else AdapterWeights("", {})
        assert not isinstance(each.prompt, str)
        said = [*each.prompt, *tokens(outputs)]
        rows = dense_forms.logits(tiny_model(MODEL), weights, torch.tensor([said]))[0].log_softmax(-1)
        rows = rows[len(each.prompt) - 1 : -1]
        assert tokens(outputs) == rows.argmax(-1).tolist(), kinds
        torch.testing.assert_close(torch.tensor(logprobs(outputs)), rows.amax(-1), rtol=1e-4, atol=1e-3)


def test_a_batch_changes_no_token(driver: CoreDriver) -> None:
    cases = [*EACH, *MIXED]
    batched = together(driver, [request(20 + index, wanted) for index, wanted in enumerate(cases)])
    quiet = CoreDriver(base(), LIMITS, load)
    alone = [quiet.run(request(20 + index, wanted)) for index, wanted in enumerate(cases)]
    assert [tokens(each) for each in batched] == [tokens(each) for each in alone]
    for one, other in zip(batched, alone, strict=True):
        torch.testing.assert_close(torch.tensor(logprobs(one)), torch.tensor(logprobs(other)), rtol=1e-5, atol=1e-5)


def test_another_adapter_says_something_else(driver: CoreDriver) -> None:
    given = prompt(20, 3)
    said = together(driver, [request(40 + index, wanted, given) for index, wanted in enumerate(EACH)])
    assert len({tuple(logprobs(outputs)) for outputs in said}) == len(EACH)


def test_cached_prefixes_are_those_of_the_adapter(driver: CoreDriver) -> None:
    given = prompt(37, 4)
    first = [tokens(driver.run(request(60 + i, wanted, given))) for i, wanted in enumerate(EACH)]
    again = together(driver, [request(80 + i, wanted, given) for i, wanted in enumerate(EACH)])
    assert [tokens(outputs) for outputs in again] == first
    assert driver.core.scheduler.num_prefix_hits > 0


def test_preempted_requests_say_the_same(driver: CoreDriver) -> None:
    cases = [*EACH[:8], *MIXED]
    requests = [request(100 + index, wanted, prompt(14, index), max_tokens=36) for index, wanted in enumerate(cases)]
    tight = CoreDriver(base(), TIGHT, load)
    pressed, roomy = together(tight, requests), together(driver, requests)
    assert tight.core.scheduler.num_preemptions > 0
    assert [tokens(outputs) for outputs in pressed] == [tokens(outputs) for outputs in roomy]


def test_beside_an_int8_base(driver: CoreDriver) -> None:
    """Rounding of the base changes log probabilities a little, an adapter left out would change them a lot."""
    rounded = CoreDriver(base(), LIMITS, load, "int8")
    given = prompt(20, 5)
    requests = [request(120 + index, wanted, given) for index, wanted in enumerate(EACH)]
    batched = together(rounded, requests)
    quiet = CoreDriver(base(), LIMITS, load, "int8")
    assert [tokens(outputs) for outputs in batched] == [tokens(quiet.run(each)) for each in requests]
    exact = torch.tensor([logprobs(outputs)[0] for outputs in together(driver, requests)])
    found = torch.tensor([logprobs(outputs)[0] for outputs in batched])
    assert found.sub(exact).norm() < 0.5 * exact.sub(exact[0]).norm()
