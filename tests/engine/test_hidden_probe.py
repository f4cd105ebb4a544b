"""Hidden states of the last decoder layer, as transformers has them, whatever else is in the batch."""

import copy
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from adapters_store.forms import AdapterWeights, Form, LowRank
from server.engine.answer import Answer
from server.engine.build import build_core
from server.engine.core import EngineCore
from server.engine.limits import BLOCK_SIZE, EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.engine.sequence import Sequence as EngineSequence
from server.engine.tokenizer import Tokenizer
from server.model.decoder_layers import decoder_layers
from server.model.loader import describe
from tests.support.models import tiny_model, tiny_tokenizer

ARCHITECTURES = ("llama", "gemma2", "gpt_neox", "opt", "qwen3_moe")
LIMITS = EngineLimits(kv_cache_memory=1 << 20, adapter_memory=1 << 20, max_batch_tokens=24, max_running=8)
GREEDY = SamplingParams(temperature=0, ignore_eos=True)
TOKENS = 5
Shown = dict[str, dict[int, torch.Tensor]]


def adapter(architecture: str, digest: str) -> AdapterWeights:
    """Random factors on every linear of the layers."""
    source = torch.Generator().manual_seed(len(digest))
    modules = dict[str, tuple[Form, ...]]()
    for name, module in tiny_model(architecture).named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head" and "gate" not in name:
            rows, columns = module.weight.shape
            a = torch.randn(3, columns, generator=source) * 0.1
            modules[name] = (LowRank(a, torch.randn(rows, 3, generator=source) * 0.1, torch.full((3,), 0.7)),)
    return AdapterWeights(digest, modules)


def oracle(architecture: str, prompt: Sequence[int], digest: str | None) -> list[torch.Tensor]:
    """What the last layer gives at the last position of each call while transformers generates."""
    model: Any = copy.deepcopy(tiny_model(architecture))
    for name, (form, *_) in (adapter(architecture, digest).modules if digest else {}).items():
        assert isinstance(form, LowRank)
        model.get_submodule(name).weight.data += (form.b * form.d) @ form.a
    layers = decoder_layers(describe(model, tiny_tokenizer(), "tiny"))
    seen: list[torch.Tensor] = []
    layers[-1].register_forward_hook(lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1]))
    model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    return seen


def add(core: EngineCore, shown: Shown, request_id: str, prompt: Sequence[int], digest: str | None) -> None:
    def keep(call: int, hidden: torch.Tensor) -> None:
        assert call not in shown[request_id]
        shown[request_id][call] = hidden.clone()

    shown[request_id] = {}
    adapters = (WeightedAdapter(digest),) if digest else ()
    probe = None if request_id.startswith("plain") else keep
    request = GenerationRequest(request_id, tuple(prompt), GREEDY, adapters, hidden_probe=probe)
    sequence = EngineSequence(request, list(prompt), TOKENS, "base", BLOCK_SIZE)
    text = Tokenizer(tiny_tokenizer()).stream(list(prompt))
    assert core.add(Answer(sequence, text, seed=0, eos_ids=(), grammar=None)) == []


def run(core: EngineCore, arrived: threading.Semaphore) -> None:
    while core.has_work:
        core.step()
        core.check_integrity()
        if core.blocked and core.has_work:
            assert arrived.acquire(timeout=60)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def built(request: pytest.FixtureRequest) -> Iterator[tuple[str, EngineCore, threading.Semaphore]]:
    architecture, arrived = str(request.param), threading.Semaphore(0)
    base = describe(tiny_model(architecture), tiny_tokenizer(), "tiny")
    core = build_core(base, LIMITS, lambda digest: adapter(architecture, digest), arrived.release)
    yield architecture, core, arrived
    core.close()


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_hidden_states_are_those_of_transformers(built: tuple[str, EngineCore, threading.Semaphore]) -> None:
    """In one batch: the base, two adapters, prompts longer than a step, and requests that nobody watches."""
    architecture, core, arrived = built
    prompts = {"base": (prompt(9, 1), None), "one": (prompt(40, 2), "one"), "three": (prompt(40, 2), "three")}
    shown: Shown = {}
    for name, (tokens, digest) in prompts.items():
        add(core, shown, name, tokens, digest)
        add(core, shown, f"plain-{name}", prompt(7, 5), digest)
    run(core, arrived)
    for name, (tokens, digest) in prompts.items():
        expected = oracle(architecture, tokens, digest)
        assert sorted(shown[name]) == list(range(TOKENS))
        assert len(expected) == TOKENS
        for call, hidden in enumerate(expected):
            assert torch.allclose(shown[name][call], hidden, rtol=1e-4, atol=1e-4 * float(hidden.abs().max()))
        assert not shown[f"plain-{name}"]
    apart = shown["one"][0] - shown["three"][0]
    assert float(apart.norm() / shown["one"][0].norm()) > 0.01


def test_alone_the_same_prompt_gives_the_same_bits(built: tuple[str, EngineCore, threading.Semaphore]) -> None:
    """Also where its blocks are in the prefix cache by then."""
    _, core, arrived = built
    shown: Shown = {}
    for name in ("first", "second"):
        add(core, shown, name, prompt(33, 4), None)
        run(core, arrived)
    for call in range(TOKENS):
        assert torch.equal(shown["first"][call], shown["second"][call])


def test_a_preempted_request_is_shown_every_call_once() -> None:
    """`add` fails where a call is shown again."""
    arrived = threading.Semaphore(0)
    base = describe(tiny_model("llama"), tiny_tokenizer(), "tiny")
    page = 2 * 3 * 2 * 16 * 4 * BLOCK_SIZE  # bytes of a block: keys and values of all layers and heads in float32
    limits = EngineLimits(kv_cache_memory=5 * page, adapter_memory=page, max_running=4)
    core = build_core(base, limits, lambda digest: adapter("llama", digest), arrived.release)
    shown: Shown = {}
    prompts = {str(number): prompt(BLOCK_SIZE * 2 - 2, number) for number in range(4)}
    for name, tokens in prompts.items():
        add(core, shown, name, tokens, None)
    run(core, arrived)
    core.close()
    assert core.stats.preemptions_total > 0
    for name, tokens in prompts.items():
        for call, hidden in enumerate(oracle("llama", tokens, None)):
            assert torch.allclose(shown[name][call], hidden, rtol=1e-4, atol=1e-4 * float(hidden.abs().max()))


def test_nothing_is_hooked_without_a_probe() -> None:
    arrived = threading.Semaphore(0)
    base = describe(tiny_model("llama"), tiny_tokenizer(), "tiny")
    core = build_core(base, LIMITS, lambda digest: adapter("llama", digest), arrived.release)
    [*_, last] = decoder_layers(base)
    shown: Shown = {}
    add(core, shown, "watched", prompt(5, 1), None)
    run(core, arrived)
    assert not last._forward_hooks
    assert len(shown["watched"]) == TOKENS
    core.close()


def test_over_an_int8_base() -> None:
    """Its products round; what is shown is near the unrounded model's, and another adapter's is far."""
    arrived = threading.Semaphore(0)
    base = describe(tiny_model("llama"), tiny_tokenizer(), "tiny")
    core = build_core(base, LIMITS, lambda digest: adapter("llama", digest), arrived.release, "int8")
    shown: Shown = {}
    tokens = prompt(12, 7)
    for digest in ("one", "three"):
        add(core, shown, digest, tokens, digest)
    run(core, arrived)
    core.close()
    for digest, other in (("one", "three"), ("three", "one")):
        near, far = oracle("llama", tokens, digest)[0], oracle("llama", tokens, other)[0]
        apart = [float((shown[digest][0] - each).norm() / each.norm()) for each in (near, far)]
        assert apart[0] < 0.15
        assert apart[1] > 2 * apart[0]
