"""Compiled layers give the answers of Hugging Face and PEFT, and compile nothing while they do."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from server.engine.background_compiler import CACHE_VARIABLE
from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.model.compiled import CompiledLayer
from server.model.decoder_layers import decoder_layers
from server.model.step_context import StepContext
from tests.e2e.world import ADAPTERS, World, build_world
from tests.support.driver import CoreDriver, tokens
from tests.support.models import EOS_ID, VOCABULARY

GPT2 = {
    "one": {"r": 5, "lora_alpha": 10, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "two": {"r": 3, "lora_alpha": 9, "target_modules": ["c_attn"], "fan_in_fan_out": True},
}
LIMITS = EngineLimits(kv_cache_memory=8 << 20, adapter_memory=64 << 20, max_batch_tokens=23)


@dataclass
class Engine:
    world: World
    driver: CoreDriver
    names: list[str]

    @property
    def context(self) -> StepContext:
        return self.driver.core._runner._context

    def add(self, request_id: str, prompt: tuple[int, ...], adapters: tuple[tuple[str, float], ...]) -> None:
        weighted = tuple(WeightedAdapter(self.world.digests[name], weight) for name, weight in adapters)
        sampling = SamplingParams(max_tokens=6, temperature=0)
        self.driver.add(GenerationRequest(request_id, prompt, sampling, weighted))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    architecture: str = request.param
    adapters = ADAPTERS if architecture == "llama" else GPT2
    overrides = {"tie_word_embeddings": False} if architecture == "llama" else {}
    world = build_world(tmp_path_factory.mktemp(architecture), architecture, adapters, **overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("inductor")))
        driver = CoreDriver(world.base(), LIMITS, world.registry.load, compiling=True)
        before = compiled_graphs()
        driver.core.start()
        assert driver.core.compiler is not None
        assert driver.core.compiler.wait(300)
        assert compiled_graphs() == before + 2, "one graph with adapters and one without, for all layers"
        yield Engine(world, driver, sorted(adapters))
        driver.core.close()


def compiled_graphs() -> int:
    """Graphs that AOTAutograd has seen in this process, from the cache or not."""
    return counters["aot_autograd"]["total"]


def test_mixed_steps_equal_the_oracle_and_compile_nothing(engine: Engine) -> None:
    """Requests of all lengths and adapters arrive at random, so steps have all sizes, one row upwards."""
    for name in engine.names:  # all in memory: how long a load takes would else decide which steps there are
        engine.add(f"warm {name}", (5,), ((name, 1.0),))
    engine.driver.drain()
    chance = random.Random(3)
    before, sizes = compiled_graphs(), Counter[tuple[bool, int]]()
    made = {}
    for number in range(24):
        prompt = tuple(chance.randrange(3, VOCABULARY) for _ in range(chance.choice((1, 2, 9, 30))))
        count = 0 if number < 4 else chance.choice((0, 1, 1, 2))
        names = chance.sample([name for name in engine.names if count < 2 or name != "own-head"], count)
        made[f"r{number}"] = (prompt, tuple((name, chance.choice((1.0, 0.7))) for name in names))
    waiting = list(made)
    while waiting or engine.driver.core.has_work:
        # The first few come one after another and alone: steps of a single row.
        while waiting and (not engine.driver.core.has_work or (len(waiting) < 20 and chance.random() < 0.3)):
            name = waiting.pop(0)
            engine.add(name, *made[name])
        engine.driver.step()
        step = engine.context.compiled_step
        assert engine.context.attention is not None
        if step is not None:
            sizes[step.with_adapters, len(engine.context.attention.slots)] += 1
    for name, (prompt, adapters) in made.items():
        expected, _ = engine.world.oracle.greedy(prompt, adapters, 6, (EOS_ID,))
        assert tokens(engine.driver.outputs[name]) == expected, (prompt, adapters)
    assert len({rows for _, rows in sizes}) > 10
    assert {(False, 1), (True, 1)} <= sizes.keys()
    assert compiled_graphs() == before


def test_the_layers_do_run_compiled(engine: Engine) -> None:
    """Eager layers reach each linear's Python code; compiled ones do not."""
    compiled = engine.context.compiled
    assert compiled
    [linear] = [m for m in engine.driver._base.model.modules() if getattr(m, "index", None) == min(compiled)]
    calls: list[int] = []
    hook = linear.register_forward_hook(lambda *_: calls.append(1))
    try:
        engine.add("compiled", (5, 6, 7), ())
        engine.driver.drain()
        assert calls == []
        engine.context.compiled = None
        engine.add("eager", (5, 6, 7), ())
        engine.driver.drain()
        assert calls
    finally:
        engine.context.compiled = compiled
        hook.remove()
    assert tokens(engine.driver.outputs["compiled"]) == tokens(engine.driver.outputs["eager"])


def test_a_row_is_the_same_alone_and_in_a_batch(engine: Engine) -> None:
    """But for what the float products themselves do with the number of rows."""
    prompt, adapters = (9, 8, 7, 6), ((engine.names[0], 1.0),)
    logprobs = {}
    for name, others in (("alone", 0), ("among", 5)):
        for number in range(others):
            engine.add(f"{name}-{number}", (11 + number, 12), ())
        weighted = tuple(WeightedAdapter(engine.world.digests[n], w) for n, w in adapters)
        sampling = SamplingParams(max_tokens=5, temperature=0, logprobs=0, ignore_eos=True)
        engine.driver.add(GenerationRequest(name, prompt, sampling, weighted))
        engine.driver.drain()
        logprobs[name] = [output.logprob for output in engine.driver.outputs[name]]
    assert logprobs["alone"] == pytest.approx(logprobs["among"], abs=1e-5)


def test_a_second_start_finds_the_code_in_the_cache(engine: Engine) -> None:
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    misses = counters["aot_autograd"]["autograd_cache_miss"]
    driver = CoreDriver(engine.world.base(), LIMITS, engine.world.registry.load, compiling=True)
    driver.core.start()
    assert driver.core.compiler is not None
    assert driver.core.compiler.wait(120)
    driver.core.close()
    assert counters["aot_autograd"]["autograd_cache_hit"] == hits + 2
    assert counters["aot_autograd"]["autograd_cache_miss"] == misses


def test_hidden_states_of_compiled_layers(engine: Engine) -> None:
    """What the last layer gives is seen as transformers has it, of one adapter and of another."""
    last = decoder_layers(engine.driver._base)[-1]
    assert isinstance(last.forward, CompiledLayer)
    prompt, shown = (9, 8, 7, 6, 11), dict[str, dict[int, torch.Tensor]]()

    def keep(own: dict[int, torch.Tensor], call: int, hidden: torch.Tensor) -> None:
        assert engine.context.compiled_step is not None
        own[call] = hidden.clone()

    for name in engine.names[:2]:
        shown[name] = {}
        adapters = (WeightedAdapter(engine.world.digests[name]),)
        sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        probe = partial(keep, shown[name])
        engine.driver.add(GenerationRequest(f"seen {name}", prompt, sampling, adapters, hidden_probe=probe))
    engine.driver.drain()
    for name, found in shown.items():
        model = engine.world.oracle._adapt(((name, 1.0),))
        layers = next(part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == 3)
        seen: list[torch.Tensor] = []
        hook = layers[-1].register_forward_hook(
            lambda _, __, out, own=seen: own.append(out[0] if isinstance(out, tuple) else out)
        )
        model(torch.tensor([[*prompt, *tokens(engine.driver.outputs[f"seen {name}"])[:-1]]]), use_cache=False)
        hook.remove()
        expected = seen[0][0, len(prompt) - 1 :]
        assert sorted(found) == list(range(4))
        apart = (torch.stack([found[call] for call in range(4)]) - expected).norm() / expected.norm()
        assert float(apart) < 1e-4
