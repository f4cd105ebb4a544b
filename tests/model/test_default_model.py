"""The default model: unpacked once, the same from the cache, and able to answer."""

from pathlib import Path

import pytest
import torch

from kernels import dispatch
from server.model import default_model
from server.model.base import BaseModel
from server.model.kv_cache import KVCache
from server.model.loader import load_base_model
from server.model.prepare import forward, prepare_model
from server.model.step_context import AttentionMetadata, StepContext


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dispatch.load()  # before POLYRANK_CACHE moves, or the kernels would be built again
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYRANK_CACHE", str(cache))


@pytest.fixture(scope="module")
def unpacked(cache: Path) -> BaseModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYRANK_CACHE", str(cache))
        return load_base_model("smollm2", dtype=torch.float32)


def test_facts(unpacked: BaseModel) -> None:
    assert unpacked.id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (unpacked.num_layers, unpacked.num_heads, unpacked.num_kv_heads, unpacked.head_dim) == (30, 9, 3, 64)
    assert (unpacked.vocabulary, unpacked.max_context, unpacked.eos_token_ids) == (49152, 8192, (2,))
    assert unpacked.spec.tied
    assert len(unpacked.spec.modules) == 30 * 7 + 2


def test_the_cache_holds_the_same_model(unpacked: BaseModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [path.name[:21] for path in (cache / "models").iterdir()] == ["SmolLM2-135M-Instruct"]
    monkeypatch.setattr(default_model, "load_gguf", None)  # must not be unpacked again
    again = load_base_model("smollm2", dtype=torch.float32)
    assert again.fingerprint == unpacked.fingerprint
    for name, parameter in unpacked.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter)
    assert load_base_model("smollm2", dtype=torch.bfloat16).fingerprint == unpacked.fingerprint


def test_a_chat_prompt_is_answered() -> None:
    base = load_base_model("smollm2", dtype=torch.float32)
    context = prepare_model(base)
    context.cache = KVCache(8, base.num_layers, base.num_kv_heads, base.head_dim, dtype=base.dtype)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = _greedy(base, context, prompt, 16)
    assert answer[-1] in base.eos_token_ids
    assert base.tokenizer.decode(answer[:-1]) == "The capital of France is Paris."


def test_a_cache_that_cannot_be_used_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = object(), torch.nn.Linear(2, 2).to(torch.bfloat16)
    model.config = type("Config", (), {})()
    (tmp_path / "file").touch()
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path / "file"))  # a file where a folder should be
    monkeypatch.setattr(default_model, "load_gguf", lambda path, dtype: (model, tokenizer))
    (tmp_path / "x.gguf").touch()
    assert default_model.load_default(tmp_path / "x.gguf", torch.float32) == (model, tokenizer)
    assert model.weight.dtype == torch.float32


def _greedy(base: BaseModel, context: StepContext, prompt: list[int], limit: int) -> list[int]:
    tokens, done = list(prompt), 0
    answer: list[int] = []
    while len(answer) < limit and not (answer and answer[-1] in base.eos_token_ids):
        count = len(tokens) - done
        context.begin(
            AttentionMetadata(
                query_start=torch.tensor([0, count], dtype=torch.int32),
                kv_length=torch.tensor([len(tokens)], dtype=torch.int32),
                block_table=torch.arange(8, dtype=torch.int32)[None],
                slots=torch.arange(done, len(tokens)),
            )
        )
        step = torch.tensor(tokens[done:])
        logits = forward(base, context, step, torch.arange(done, len(tokens)), torch.tensor([count - 1]))
        done = len(tokens)
        answer.append(int(logits.argmax()))
        tokens.append(answer[-1])
    return answer
