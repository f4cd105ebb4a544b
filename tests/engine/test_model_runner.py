"""Runner, storage and loader with a real tiny model, against transformers alone and against merged weights."""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch

from adapters_store.errors import AdapterCorrupt
from adapters_store.forms import AdapterWeights, Form, LowRank, ReplacedWeight
from kernels import dispatch
from kernels.segments import Limits, Segments
from server.engine.answer import Answer
from server.engine.async_engine import AsyncEngine
from server.engine.build import build_core, build_engine
from server.engine.core import EngineCore
from server.engine.limits import BLOCK_SIZE, EngineLimits
from server.engine.request import FinishReason, GenerationRequest, SamplingParams, StepOutput
from server.engine.sequence import Sequence
from server.engine.tokenizer import Tokenizer
from server.model.errors import ModelLoadError
from server.model.loader import describe
from tests.engine.support import weighted
from tests.support.models import VOCABULARY, tiny_model, tiny_tokenizer

LIMITS = EngineLimits(kv_cache_memory=1 << 20, adapter_memory=1 << 20, max_batch_tokens=24, max_running=8)
RANKS = {"one": 3, "two": 8}
GREEDY = SamplingParams(temperature=0, ignore_eos=True, logprobs=2)
TOLERANCE = 1e-3  # of log probabilities, float32, logits of about 10


def adapter(digest: str) -> AdapterWeights:
    """Random factors on every linear of the layers, on the embedding, and (`two`) a head of its own."""
    if digest not in RANKS:
        raise AdapterCorrupt(f"no adapter {digest}")
    source = torch.Generator().manual_seed(RANKS[digest])
    rank, modules = RANKS[digest], dict[str, tuple[Form, ...]]()
    for name, module in tiny_model("qwen2").named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and name != "lm_head":
            embedding = isinstance(module, torch.nn.Embedding)
            rows, columns = module.weight.T.shape if embedding else module.weight.shape
            a = torch.randn(rank, columns, generator=source) * 0.1
            b = torch.randn(rows, rank, generator=source) * 0.1
            modules[name] = (LowRank(a, b, torch.full((rank,), 0.7)),)
    if digest == "two":
        weight = torch.randn(VOCABULARY, 64, generator=source) * 0.2
        modules["lm_head"] = (ReplacedWeight(weight),)
    return AdapterWeights(digest, modules)


def merged(adapters: Iterable[tuple[str, float]]) -> torch.nn.Module:
    """transformers' own model with the deltas added to its weights."""
    model: torch.nn.Module = copy.deepcopy(tiny_model("qwen2"))
    for digest, weight in adapters:
        for name, forms in adapter(digest).modules.items():
            target = model.get_submodule(name).get_parameter("weight")
            for form in forms:
                if isinstance(form, LowRank):
                    delta = weight * (form.b * form.d) @ form.a
                    target.data += delta.T if "embed" in name else delta
                elif isinstance(form, ReplacedWeight):
                    target.data = form.weight
    return model


def logprobs(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.log_softmax(dim=-1)


@dataclass
class Bench:
    """The core, stepped by hand."""

    core: EngineCore
    tokenizer: Tokenizer
    arrived: threading.Semaphore
    outputs: dict[str, list[StepOutput]] = field(default_factory=dict)

    def add(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams = GREEDY,
        adapters: Iterable[tuple[str, float]] = (),
        max_tokens: int = 6,
        probe: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        request = GenerationRequest(request_id, tuple(prompt), params, weighted(adapters), probe=probe)
        sequence = Sequence(request, prompt, max_tokens, "base", BLOCK_SIZE)
        answer = Answer(sequence, self.tokenizer.stream(prompt), seed=params.seed or 0, eos_ids=(), grammar=None)
        self.outputs[request_id] = []
        assert self.core.add(answer) == []

    def run(self) -> None:
        for _ in range(400):
            if not self.core.has_work:
                break
            for request_id, output in self.core.step():
                self.outputs[request_id].append(output)
            self.core.check_integrity()
            if self.core.blocked and self.core.has_work:
                assert self.arrived.acquire(timeout=60)
        assert not self.core.has_work

    def tokens(self, request_id: str) -> list[int]:
        return [output.token_id for output in self.outputs[request_id] if output.token_id is not None]


@pytest.fixture(scope="module")
def built() -> Iterator[Bench]:
    base = describe(tiny_model("qwen2"), tiny_tokenizer(), "tiny/qwen2")
    arrived = threading.Semaphore(0)
    core = build_core(base, LIMITS, adapter, arrived.release)
    yield Bench(core, Tokenizer(base.tokenizer), arrived)
    core.loader.close()


def test_kernels_are_told_the_highest_rank_and_to_expect_every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Limits | None] = []

    def place(segments: Segments, device: torch.device, limits: Limits | None) -> Segments:
        told.append(limits)
        return segments

    monkeypatch.setattr(dispatch, "place", place)
    base = describe(tiny_model("qwen2"), tiny_tokenizer(), "tiny/qwen2")
    arrived = threading.Semaphore(0)
    core = build_core(base, replace(LIMITS, max_rank=300), adapter, arrived.release)
    bench = Bench(core, Tokenizer(base.tokenizer), arrived)
    bench.add("told", prompt(4, 1), adapters=[("one", 1.0)], max_tokens=1)
    bench.run()
    core.close()
    assert set(told) == {Limits(width=300, factors=1, cores=False)}  # of what has been here: float32 factors


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_likely(bench: Bench, name: str, tokens: list[int], adapters: Iterable[tuple[str, float]]) -> None:
    """Every token is the likeliest one by transformers, and its log probability and the runner-up are right."""
    said = bench.tokens(name)
    expected = logprobs(merged(adapters), tokens + said)[len(tokens) - 1 : -1]
    for row, output in zip(expected, bench.outputs[name], strict=True):
        assert output.token_id is not None
        assert output.logprob == pytest.approx(float(row.max()), abs=TOLERANCE)
        assert float(row[output.token_id]) == pytest.approx(float(row.max()), abs=TOLERANCE)
        for candidate, value in zip(output.top, row.topk(2).values.tolist(), strict=True):
            assert candidate.logprob == pytest.approx(value, abs=TOLERANCE)
            assert float(row[candidate.token_id]) == pytest.approx(value, abs=TOLERANCE)


MIXES: list[list[tuple[str, float]]] = [
    [],
    [("one", 1.0)],
    [("two", 1.0)],
    [("one", -0.5)],
    [("one", 0.5), ("two", 1.0)],
    [("two", 1.0), ("one", 0.5)],
]


def test_a_mixed_batch_is_what_transformers_says_of_each_with_merged_weights(built: Bench) -> None:
    """Chunked prefill (24 tokens a step), decodes, and six adapter mixes in one batch."""
    for index, mix in enumerate(MIXES):
        built.add(f"mix{index}", prompt(5 + 7 * index, index), adapters=mix)
    built.run()
    for index, mix in enumerate(MIXES):
        assert_likely(built, f"mix{index}", prompt(5 + 7 * index, index), mix)


def test_swapped_adapters_would_be_noticed(built: Bench) -> None:
    built.add("swap", prompt(9, 50), adapters=[("one", 1.0)])
    built.run()
    with pytest.raises(AssertionError):
        assert_likely(built, "swap", prompt(9, 50), [("two", 1.0)])
    with pytest.raises(AssertionError):
        assert_likely(built, "swap", prompt(9, 50), [("one", 0.9)])


def test_an_adapter_named_twice_counts_twice(built: Bench) -> None:
    built.add("twice", prompt(9, 51), adapters=[("one", 0.5), ("one", 0.25)])
    built.run()
    assert_likely(built, "twice", prompt(9, 51), [("one", 0.75)])


def test_cached_prefixes_change_no_answer(built: Bench) -> None:
    shared = prompt(40, 60)
    for name in ("cold", "warm"):
        built.add(name, [*shared, 9], adapters=[("one", 1.0)])
        built.run()
    first, second = (built.outputs[name][0].prompt for name in ("cold", "warm"))
    assert first is not None
    assert second is not None
    assert (first.cached_tokens, second.cached_tokens) == (0, 32)
    assert built.tokens("warm") == built.tokens("cold")
    assert_likely(built, "warm", [*shared, 9], [("one", 1.0)])


@pytest.mark.parametrize("length", [1, 2, 30, 61])
def test_prompt_logprobs_are_those_of_transformers(built: Bench, length: int) -> None:
    name, tokens = f"prompt{length}", prompt(length, 70)
    params = SamplingParams(temperature=0, prompt_logprobs=3)
    built.add(f"{name}-filler", prompt(20, 71))
    built.add(name, tokens, params, [("one", 1.0)], max_tokens=2)
    built.run()
    facts = built.outputs[name][0].prompt
    assert facts is not None
    expected = logprobs(merged([("one", 1.0)]), tokens)
    assert len(facts.logprobs) == len(facts.top) == length
    assert (facts.logprobs[0], facts.top[0]) == (None, ())
    for position in range(1, length):
        row = expected[position - 1]
        assert facts.logprobs[position] == pytest.approx(float(row[tokens[position]]), abs=TOLERANCE)
        values = [candidate.logprob for candidate in facts.top[position]]
        assert values == pytest.approx(row.topk(3).values.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("length", [1, 30, 61])
def test_a_probe_sees_the_logits_of_every_prompt_position(built: Bench, length: int) -> None:
    tokens, seen = prompt(length, 72), dict[int, torch.Tensor]()
    for turn in range(2):  # the second time the prompt lies in the cache
        built.add(f"probed{length}-{turn}", tokens, adapters=[("one", 1.0)], max_tokens=3, probe=seen.__setitem__)
        built.run()
        assert sorted(seen) == list(range(length))
        found = torch.stack([seen.pop(position) for position in range(length)]).log_softmax(dim=-1)
        assert torch.allclose(found, logprobs(merged([("one", 1.0)]), tokens), atol=TOLERANCE)


def test_sampling_does_not_depend_on_the_batch(built: Bench) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=11, ignore_eos=True)
    built.add("alone", prompt(12, 80), params, [("one", 1.0)], max_tokens=12)
    built.run()
    for index in range(5):
        built.add(f"mate{index}", prompt(3 + 6 * index, 81 + index), adapters=MIXES[index], max_tokens=9)
    built.add("among", prompt(12, 80), params, [("one", 1.0)], max_tokens=12)
    built.run()
    assert built.tokens("among") == built.tokens("alone")
    assert len(set(built.tokens("alone"))) > 3


def test_an_adapter_that_cannot_be_read_fails_its_request_alone(built: Bench) -> None:
    built.add("corrupt", prompt(5, 90), adapters=[("missing", 1.0)])
    built.add("fine", prompt(5, 90), max_tokens=3)
    built.run()
    [output] = built.outputs["corrupt"]
    assert output.error is not None
    assert output.error.code == "adapter_corrupt"
    assert len(built.tokens("fine")) == 3


def test_too_little_memory_for_a_block_stops_the_start() -> None:
    base = describe(tiny_model("qwen2"), tiny_tokenizer(), "tiny/qwen2")
    with pytest.raises(ModelLoadError, match="--kv-cache-memory"):
        build_core(base, EngineLimits(kv_cache_memory=100), adapter, lambda: None)


async def test_the_whole_engine_answers_with_an_adapter() -> None:
    base = describe(tiny_model("qwen2"), tiny_tokenizer(), "tiny/qwen2")
    engine: AsyncEngine = build_engine(base, EngineLimits(1 << 20, 1 << 20, max_context=100), adapter)
    assert (engine.info.max_context, engine.info.block_size) == (100, BLOCK_SIZE)
    engine.start()
    try:
        request = GenerationRequest("a", "the question", GREEDY, weighted(["one"]))
        outputs = [output async for output in await engine.submit(request)]
    finally:
        await engine.stop()
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    tokens = engine.tokenizer.encode("the question")
    said = [output.token_id for output in outputs if output.token_id is not None]
    expected = logprobs(merged([("one", 1.0)]), tokens + said)[len(tokens) - 1 : -1]
    assert [output.logprob for output in outputs] == pytest.approx(expected.max(dim=-1).values.tolist(), abs=TOLERANCE)
    assert "".join(output.text for output in outputs) == engine.tokenizer.decode(said, skip_special_tokens=True)
