"""Siblings that read one x: found by watching a step, computed together, and the same numbers as one by one."""

import copy
from typing import Any

import pytest
import torch

from kernels import dispatch
from server.model.adapter_linear import AdapterLinear
from server.model.base import BaseModel
from server.model.shared_input import SharedLinear, share_inputs, watch_inputs
from server.model.step_context import StepContext
from tests.model.paged import prepared, random_requests, run, step
from tests.model.peft_pairs import lay_out, peft_model
from tests.support.models import TINY_ARCHITECTURES, VOCABULARY, tiny_model

RANKS, SLOTS = {"narrow": 1, "wide": 8}, {"narrow": 3, "wide": 2}
LENGTHS, ADAPTERS = [21, 14, 1], [3, None, 2]


def shared(architecture: str) -> tuple[BaseModel, StepContext, list[tuple[str, ...]]]:
    base, context = prepared(architecture)
    with watch_inputs(base) as seen:
        step(base, context, random_requests([5], VOCABULARY, seed=1), [5])
    return base, context, share_inputs(base, seen)


def adapted(base: BaseModel, context: StepContext, targets: list[str]) -> list[torch.Tensor]:
    lay_out(peft_model(tiny_model(base.id.removeprefix("tiny/")), targets, RANKS), context, SLOTS)
    return run(base, context, random_requests(LENGTHS, VOCABULARY, seed=1, slots=ADAPTERS), seed=2)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of modules of each call of `lowrank_group`."""
    sizes: list[int] = []
    real = dispatch.lowrank_group

    def counting(ys: Any, *rest: Any) -> None:
        sizes.append(len(ys))
        real(ys, *rest)

    monkeypatch.setattr(dispatch, "lowrank_group", counting)
    return sizes


def test_siblings_are_found() -> None:
    _, _, found = shared("llama")
    layer = [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ]
    assert found[:2] == [tuple(f"model.layers.0.{name}" for name in names) for names in layer]
    assert {len(names) for names in found} == {2, 3}


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_bits_are_those_of_one_by_one(architecture: str, groups: list[int]) -> None:
    plain, own = prepared(architecture)
    expected = adapted(plain, own, list(plain.spec.modules))
    assert groups == []
    base, context, found = shared(architecture)
    for logits, wanted in zip(adapted(base, context, list(base.spec.modules)), expected, strict=True):
        assert torch.equal(logits, wanted)
    assert set(groups) == {len(names) for names in found}
    for module in base.model.modules():
        if isinstance(module, SharedLinear):
            assert module.shared.x is None, "nothing is kept beyond the step"


def test_only_those_with_adapters_are_computed_together(groups: list[int]) -> None:
    targets = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")]
    plain, own = prepared("llama")
    expected = adapted(plain, own, targets)
    base, context, _ = shared("llama")
    assert all(
        torch.equal(logits, wanted) for logits, wanted in zip(adapted(base, context, targets), expected, strict=True)
    )
    assert set(groups) == {2}


def test_another_tensor_is_not_mistaken_for_the_one_computed_ahead() -> None:
    base, context, _ = shared("llama")
    adapted(base, context, list(base.spec.modules))
    attention = base.model.model.layers[0].self_attn
    requests = random_requests([5], VOCABULARY, seed=3, slots=[2])
    step(base, context, requests, [5])
    x, other = torch.randn(5, 64), torch.randn(5, 64)
    attention.q_proj(x)
    ahead, alone = attention.k_proj(other), AdapterLinear.forward(attention.k_proj, other)
    assert torch.equal(ahead, alone)
    assert torch.equal(attention.k_proj(x), AdapterLinear.forward(attention.k_proj, x))
    assert not torch.equal(ahead, attention.k_proj(x))


def test_a_twin_has_siblings_of_its_own() -> None:
    base, _, _ = shared("llama")
    twin = copy.deepcopy(base.model)
    attention = twin.model.layers[0].self_attn
    assert attention.q_proj.shared.members == [attention.q_proj, attention.k_proj, attention.v_proj]
    assert attention.q_proj.shared is not base.model.model.layers[0].self_attn.q_proj.shared
