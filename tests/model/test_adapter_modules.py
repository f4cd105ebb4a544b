"""Mixed batches of base rows and adapters of different rank on every module, against PEFT one request at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kernels import dispatch
from kernels.segments import Field
from server.model.adapter_linear import AdapterEmbedding, AdapterLinear
from server.model.base import BaseModel
from server.model.step_context import StepContext
from tests.model.paged import difference, plain_logits, prepared, random_requests, run, step
from tests.model.peft_pairs import PoolBuilder, empty_record, lay_out, peft_logits, peft_model
from tests.support.models import TINY_ARCHITECTURES, VOCABULARY, tiny_model

RANKS = {"narrow": 1, "middle": 5, "wide": 8}
SLOTS = {"narrow": 3, "middle": 0, "wide": 2}
ADAPTERS = ["middle", None, "narrow", "wide", "middle"]
LENGTHS = [21, 14, 1, 18, 5]


def paired(architecture: str, targets: list[str] | None = None) -> tuple[BaseModel, StepContext, Any]:
    """A prepared model and the PEFT model with the same adapters on `targets` (default: every target module)."""
    base, context = prepared(architecture)
    names = list(base.spec.modules) if targets is None else targets
    oracle = peft_model(tiny_model(architecture), names, RANKS)
    lay_out(oracle, context, SLOTS)
    return base, context, oracle


def slots_of(adapters: list[str | None]) -> list[int | None]:
    return [None if adapter is None else SLOTS[adapter] for adapter in adapters]


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_mixed_rows_equal_peft(architecture: str) -> None:
    base, context, oracle = paired(architecture)
    requests = random_requests(LENGTHS, VOCABULARY, seed=1, slots=slots_of(ADAPTERS))
    found = run(base, context, requests, seed=2)
    for request, adapter, logits in zip(requests, ADAPTERS, found, strict=True):
        expected = peft_logits(oracle, request.tokens, adapter)
        assert difference(logits, expected) < 1e-4
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_a_swapped_adapter_would_be_noticed(architecture: str) -> None:
    base, context, oracle = paired(architecture)
    swapped: list[str | None] = ["wide", "middle", None, "narrow", "wide"]
    requests = random_requests(LENGTHS, VOCABULARY, seed=1, slots=slots_of(swapped))
    for request, adapter, logits in zip(requests, ADAPTERS, run(base, context, requests, seed=2), strict=True):
        assert difference(logits, peft_logits(oracle, request.tokens, adapter)) > 0.01


@pytest.mark.parametrize("kind", ["q_proj", "embed_tokens", "lm_head"])
def test_each_kind_of_module_alone(kind: str) -> None:
    names = [name for name in prepared("gemma")[1].module_names if name.endswith(kind)]
    base, context, oracle = paired("gemma", names)
    requests = random_requests(LENGTHS, VOCABULARY, seed=1, slots=slots_of(ADAPTERS))
    for request, adapter, logits in zip(requests, ADAPTERS, run(base, context, requests, seed=2), strict=True):
        expected = peft_logits(oracle, request.tokens, adapter)
        assert difference(logits, expected) < 1e-4
        if adapter is not None and len(request.tokens) > 1:  # a query sees its own key alone, whatever q_proj says
            assert difference(plain_logits(tiny_model("gemma"), request.tokens), expected) > 1e-3


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_base_rows_do_not_feel_their_batch_mates(architecture: str) -> None:
    base, context, _ = paired(architecture)
    mixed = random_requests(LENGTHS, VOCABULARY, seed=1, slots=slots_of(ADAPTERS))
    plain = random_requests(LENGTHS, VOCABULARY, seed=1)
    row = LENGTHS[0]
    with_adapters = step(base, context, mixed, LENGTHS)[row : row + LENGTHS[1]]
    without = step(base, context, plain, LENGTHS)[row : row + LENGTHS[1]]
    assert torch.equal(with_adapters, without)


def test_the_head_sees_the_kept_rows_only() -> None:
    base, context, oracle = paired("llama")
    requests = random_requests(LENGTHS, VOCABULARY, seed=1, slots=slots_of(ADAPTERS))
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    order = torch.tensor([3, 0, 4, 1, 2])
    logits = step(base, context, requests, LENGTHS, kept=last[order])
    for row, index in enumerate(order.tolist()):
        expected = peft_logits(oracle, requests[index].tokens, ADAPTERS[index])[-1]
        assert difference(logits[row], expected) < 1e-4


def test_a_saved_head_replaces_the_base_head_of_its_rows() -> None:
    base, context = prepared("llama")
    assert context.table is not None
    assert context.head is not None
    torch.manual_seed(5)
    weight, bias = torch.randn(VOCABULARY, 64) * 0.2, torch.randn(VOCABULARY)
    builder, record = PoolBuilder(), empty_record()
    record[Field.WEIGHT], record[Field.WEIGHT_BIAS] = builder.add(weight), builder.add(bias)
    context.table.set(1, context.module_index[context.head], record)
    context.pool = builder.pool()
    requests = random_requests([12, 9], VOCABULARY, seed=1, slots=[1, None])
    changed, base_rows = run(base, context, requests, seed=2)
    model = tiny_model("llama")
    model.lm_head = nn.Linear(64, VOCABULARY)
    model.lm_head.weight, model.lm_head.bias = nn.Parameter(weight), nn.Parameter(bias)
    assert difference(changed, plain_logits(model, requests[0].tokens)) < 1e-4
    assert difference(base_rows, plain_logits(tiny_model("llama"), requests[1].tokens)) < 1e-4


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the adapter kernels that ran."""
    seen: list[str] = []

    def spy(name: str, kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*arguments: Any) -> torch.Tensor:
            seen.append(name)
            return kernel(*arguments)

        return call

    for name in ("lowrank", "lowrank_embedding", "replace_weight"):
        monkeypatch.setattr(dispatch, name, spy(name, getattr(dispatch, name)))
    return seen


def test_base_traffic_runs_no_adapter_kernel(calls: list[str]) -> None:
    base, context, _ = paired("llama")
    run(base, context, random_requests([9, 4], VOCABULARY, seed=1), seed=0)
    assert calls == []


def test_only_touched_modules_run_a_kernel(calls: list[str]) -> None:
    base, context, _ = paired("llama", ["model.layers.1.self_attn.q_proj", "model.embed_tokens"])
    step(base, context, random_requests([9, 4], VOCABULARY, seed=1, slots=[0, None]), [9, 4])
    assert sorted(calls) == ["lowrank", "lowrank_embedding"]


def test_a_cleared_slot_adds_nothing(calls: list[str]) -> None:
    base, context, _ = paired("llama")
    assert context.table is not None
    for slot in SLOTS.values():
        context.table.clear(slot)
    requests = random_requests([9], VOCABULARY, seed=1, slots=[0])
    found = run(base, context, requests, seed=0)[0]
    assert difference(found, plain_logits(tiny_model("llama"), requests[0].tokens)) < 1e-4
    assert calls == []


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_wrapping_keeps_weights_tied_and_attributes_readable(architecture: str) -> None:
    base, _context = prepared(architecture)
    head, embedding = base.model.get_output_embeddings(), base.model.get_input_embeddings()
    assert isinstance(head, AdapterLinear)
    assert head.head
    assert isinstance(embedding, AdapterEmbedding)
    assert (head.weight is embedding.weight) == base.spec.tied == base.model.config.tie_word_embeddings
    assert embedding.num_embeddings == VOCABULARY
    assert embedding.padding_idx == embedding.base.padding_idx
    with pytest.raises(AttributeError):
        _ = embedding.no_such_attribute


def test_wrapped_modules_can_be_compiled() -> None:
    base, context = prepared("llama")
    layer = base.model.model.layers[0].self_attn.q_proj
    compiled: Any = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    x = torch.randn(1, 5, 64)
    context.segments = None
    assert torch.equal(compiled(x), layer(x))
