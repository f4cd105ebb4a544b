"""A GPU's whole way of a request: fused layers, graphs, adapters that come and go, against transformers on a CPU."""

import copy
import threading
from functools import cache

import pytest
import torch

from adapters_store.forms import AdapterWeights, Form, LowRank
from server.engine.build import build_core
from server.engine.core import EngineCore
from server.engine.limits import EngineLimits
from server.engine.tokenizer import Tokenizer
from server.model.decoder_layers import decoder_layers
from server.model.fused_layer import FusedLayer
from server.model.loader import describe
from tests.engine.test_model_runner import Bench, logprobs, prompt
from tests.support.models import tiny_model, tiny_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# Three or four of the twelve adapters fit, and four or five of the requests.
LIMITS = EngineLimits(kv_cache_memory=1 << 18, adapter_memory=1 << 18, max_batch_tokens=24, max_running=8)
RANKS = {f"a{index}": rank for index, rank in enumerate((1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 32, 40))}
TOLERANCE = 2e-3  # of log probabilities, float32
FUSED = {"llama": True, "qwen3": True, "gemma2": False}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def adapter(architecture: str, digest: str) -> AdapterWeights:
    """On every second linear, another half for odd ones; factors of all three types in turn."""
    number = int(digest[1:])
    source, rank = torch.Generator().manual_seed(number), RANKS[digest]
    dtype, modules = DTYPES[number % 3], dict[str, tuple[Form, ...]]()
    for index, (name, module) in enumerate(tiny_model(architecture).named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and (index + number) % 2:
            a = torch.randn(rank, module.in_features, generator=source) * 0.2
            b = torch.randn(module.out_features, rank, generator=source) * 0.1
            modules[name] = (LowRank(a.to(dtype), b.to(dtype), torch.full((rank,), 0.5)),)
    return AdapterWeights(digest, modules)


def merged(architecture: str, mix: tuple[tuple[str, float], ...]) -> torch.nn.Module:
    model: torch.nn.Module = copy.deepcopy(tiny_model(architecture))
    for digest, weight in mix:
        for name, forms in adapter(architecture, digest).modules.items():
            for form in forms:
                assert isinstance(form, LowRank)
                model.get_submodule(name).get_parameter("weight").data += (
                    weight * (form.b.float() * form.d) @ form.a.float()
                )
    return model


def mixes(count: int) -> list[tuple[tuple[str, float], ...]]:
    """Base, one adapter, two, and the same adapter in neighbours."""
    found: list[tuple[tuple[str, float], ...]] = []
    for index in range(count):
        one, other = f"a{index * 5 % 12}", f"a{(index * 7 + 1) % 12}"
        kinds: list[tuple[tuple[str, float], ...]] = [(), ((one, 1.0),), ((one, 0.5), (other, -1.0)), ((one, 1.0),)]
        found.append(kinds[index % 4] if one != other else ((one, 1.0),))
    return found


def engine(architecture: str) -> tuple[Bench, EngineCore]:
    base = describe(copy.deepcopy(tiny_model(architecture)).cuda(), tiny_tokenizer(), f"tiny/{architecture}")
    arrived = threading.Semaphore(0)
    core = build_core(base, LIMITS, lambda digest: adapter(architecture, digest), arrived.release)
    fused = [isinstance(layer.forward, FusedLayer) for layer in decoder_layers(base)]
    assert fused == [FUSED[architecture]] * len(fused)
    return Bench(core, Tokenizer(base.tokenizer), arrived), core


def errors(bench: Bench, name: str, tokens: list[int], model: torch.nn.Module) -> float:
    """Largest difference of what was said of the chosen tokens, and of them to the likeliest, by `model`."""
    said = bench.tokens(name)
    expected = logprobs(model, tokens + said)[len(tokens) - 1 : -1]
    told = torch.tensor([output.logprob for output in bench.outputs[name] if output.logprob is not None])
    own = expected[torch.arange(len(said)), said]
    return float(torch.stack([(told - own).abs(), expected.max(dim=-1).values - own]).max())


@pytest.mark.parametrize("architecture", list(FUSED))
def test_many_requests_and_adapters_that_take_turns_answer_as_transformers_does(architecture: str) -> None:
    bench, core = engine(architecture)
    wanted = mixes(40)
    try:
        for round_ in range(2):  # the second one's graphs are there, and most of its adapters are not
            for index, mix in enumerate(wanted):
                bench.add(
                    f"{round_}-{index}", prompt(3 + 5 * (index % 9), index), adapters=mix, max_tokens=6 + index % 12
                )
            bench.run()
            for index, mix in enumerate(wanted):
                tokens = prompt(3 + 5 * (index % 9), index)
                assert errors(bench, f"{round_}-{index}", tokens, merged(architecture, mix)) < TOLERANCE, (index, mix)
            other = merged(architecture, (("a0", 1.0), ("a11", 1.0)))
            assert errors(bench, f"{round_}-1", prompt(8, 1), other) > 0.05, "another adapter would be noticed"
    finally:
        core.close()
    graphs = core._runner._graphs
    assert graphs is not None
    assert graphs._usable
    assert len([replay for replay in graphs._replays.values() if replay is not None]) >= 4


def test_a_request_alone_says_what_it_says_in_a_full_batch() -> None:
    bench, core = engine("llama")
    wanted = mixes(16)
    try:
        for index, mix in enumerate(wanted):
            bench.add(f"together{index}", prompt(12, index), adapters=mix, max_tokens=16)
        bench.run()
        for index, mix in enumerate(wanted):
            bench.add(f"alone{index}", prompt(12, index), adapters=mix, max_tokens=16)
            bench.run()
            assert bench.tokens(f"alone{index}") == bench.tokens(f"together{index}")
    finally:
        core.close()
