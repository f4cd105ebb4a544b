"""Compiled layers over int8 products: one call for what reads the same rows, and the answers of the eager layers."""

from collections import Counter

import pytest
from torch.fx import GraphModule

from adapters_store.compression.recipe import Dtype, in_memory
from adapters_store.forms import AdapterWeights
from server.engine.background_compiler import CACHE_VARIABLE
from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.model import compile as compiling
from server.model import layer_groups
from tests.e2e.world import build_world
from tests.support.driver import CoreDriver, logprobs

LIMITS = EngineLimits(kv_cache_memory=8 << 20, adapter_memory=64 << 20)
ADAPTERS = {"one": {"r": 5, "lora_alpha": 10}, "two": {"r": 5, "lora_alpha": 20}}
PROMPT = (5, 9, 17, 4)


@pytest.mark.parametrize("factors", ["native", "int4"])
def test_products_are_grouped_and_adapters_stay_with_their_rows(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, factors: Dtype
) -> None:
    calls: list[Counter[str]] = []
    group = layer_groups.group_products

    def spy(graph: GraphModule) -> None:
        group(graph)
        calls.append(Counter(str(node.target) for node in graph.graph.nodes if "polyrank" in str(node.target)))

    monkeypatch.setattr(compiling, "group_products", spy)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("inductor")))
    world = build_world(tmp_path_factory.mktemp("int8"), "llama", ADAPTERS)

    def load(digest: str) -> AdapterWeights:
        return in_memory(world.registry.load(digest), factors)

    driver = CoreDriver(world.base(), LIMITS, load, "int8", compiling=True)
    try:
        driver.core.start()
        assert driver.core.compiler is not None
        assert driver.core.compiler.wait(300)
        base, adapters = calls
        # Query, key and value are one call, gate and up another; adapters join the other two products as well.
        assert base == {
            "polyrank.int8_linears.default": 2,
            "polyrank.int8_linear.default": 2,
            "polyrank.attend.default": 1,
        }
        assert adapters == {"polyrank.int8_linears.default": 4, "polyrank.attend.default": 1}
        context = driver.core._runner._context
        compiled, answers = context.compiled, {}
        for kind, layers in (("compiled", compiled), ("eager", None)):
            context.compiled = layers
            for name in (None, *ADAPTERS):
                weighted = (WeightedAdapter(world.digests[name]),) if name else ()
                sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=0, ignore_eos=True)
                driver.add(GenerationRequest(f"{kind} {name}", PROMPT, sampling, weighted))
            driver.drain()
            for name in (None, *ADAPTERS):
                [answers[kind, name]] = logprobs(driver.outputs[f"{kind} {name}"])
        for name in (None, *ADAPTERS):
            assert answers["compiled", name] == pytest.approx(answers["eager", name], abs=0.02)
        assert abs(answers["compiled", "one"] - answers["compiled", "two"]) > 0.05
    finally:
        driver.core.close()
