"""Layers in few kernels: which are recognised, and the same numbers as by the layers' own code."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from server.model import prepare
from server.model.base import BaseModel
from server.model.decoder_layers import decoder_layers
from server.model.fused_layer import FusedLayer, take_apart
from server.model.loader import describe
from server.model.step_context import AttentionCall, StepContext
from server.model.verify import plain_logits as expected_logits
from server.model.verify import verify
from tests.model.paged import attach_cache, prepared, random_requests, run
from tests.model.peft_pairs import lay_out, peft_model
from tests.support.models import TINY_ARCHITECTURES, VOCABULARY, tiny_model, tiny_tokenizer

FUSED = {"llama", "mistral", "qwen2", "qwen3"}
LENGTHS, RANKS, SLOTS = [21, 14, 1, 9], {"narrow": 1, "wide": 8}, {"narrow": 3, "wide": 2}


def fused(
    architecture: str, change: Callable[[Any], None] = lambda _: None, **settings: Any
) -> tuple[BaseModel, StepContext, int]:
    """A prepared model whose layers were tried, and how many are fused."""
    model = copy.deepcopy(tiny_model(architecture, **settings))
    change(model)
    base = describe(model, tiny_tokenizer(), f"tiny/{architecture}")
    expected = expected_logits(base)
    context = prepare.prepare_model(base)
    prepare._fuse(base, context, expected, verify(base, context, expected, prepare.forward))
    attach_cache(base, context)
    return base, context, sum(isinstance(layer.forward, FusedLayer) for layer in decoder_layers(base))


def outputs(base: BaseModel, context: StepContext, slots: list[int | None]) -> list[torch.Tensor]:
    return run(base, context, random_requests(LENGTHS, VOCABULARY, seed=1, slots=slots), seed=2)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each layer that ran fused: of the rows it had."""
    rows: list[int] = []
    real = FusedLayer._attend

    def attend(self: FusedLayer, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return real(self, x, *rest)

    monkeypatch.setattr(FusedLayer, "_attend", attend)
    return rows


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_layers_of_the_llama_kind_are_recognised_and_no_others(architecture: str) -> None:
    base, _, count = fused(architecture)
    assert count == (base.num_layers if architecture in FUSED else 0)


@pytest.mark.parametrize("architecture", ["granite", "smollm3", "ministral3"])
def test_the_same_parts_in_another_class_are_not_trusted(architecture: str) -> None:
    """They scale what a layer adds, leave positions out in some layers, scale queries by position: 8 tokens need not
    show it."""
    settings = {key: value for key, value in TINY_ARCHITECTURES["llama"].items() if key != "tie_word_embeddings"}
    base, _, count = fused(architecture, **settings)
    assert count == 0
    parts = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    assert all({name for name, _ in layer.named_children()} == parts for layer in decoder_layers(base))


@pytest.mark.parametrize("architecture", sorted(FUSED))
def test_numbers_are_those_of_the_layers_own_code(architecture: str, used: list[int]) -> None:
    plain, own = prepared(architecture)
    expected = outputs(plain, own, [])
    base, context, _ = fused(architecture)
    for found, wanted in zip(outputs(base, context, []), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert used.count(used[0]) >= base.num_layers


@pytest.mark.parametrize("architecture", sorted(FUSED))
def test_adapters_are_each_rows_own(architecture: str, used: list[int]) -> None:
    results, swapped = [], []
    for base, context in (prepared(architecture), fused(architecture)[:2]):
        adapted = peft_model(tiny_model(architecture), list(base.spec.modules), RANKS)
        lay_out(adapted, context, SLOTS)
        results.append(outputs(base, context, [3, None, 2, 3]))
        swapped = outputs(base, context, [2, None, 3, 2])
    expected, found = results
    assert used
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(swapped[0], expected[0], rtol=1e-2, atol=1e-2)


def test_weights_stay_the_modules_own_and_changes_in_place_are_seen() -> None:
    base, context, _ = fused("qwen2")
    reference = tiny_model("qwen2")
    attention = base.model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        for kind in ("weight", "bias"):
            mine = attention.get_submodule(name).base.get_parameter(kind)
            assert torch.equal(mine, reference.get_parameter(f"model.layers.0.self_attn.{name}.{kind}"))
    before = outputs(base, context, [])
    kept = attention.k_proj.base.weight.clone()
    attention.k_proj.base.weight.add_(0.1)
    assert not torch.allclose(outputs(base, context, [])[0], before[0], atol=1e-3)
    attention.k_proj.base.weight.copy_(kept)
    assert torch.equal(outputs(base, context, [])[0], before[0])


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        (lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()), False),
        (lambda layer: layer.add_module("extra", nn.Identity()), False),
        (lambda layer: setattr(layer, "input_layernorm", nn.LayerNorm(64)), False),
        (lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.5), True),
    ],
    ids=["activation", "a further part", "another norm", "another epsilon"],
)
def test_a_layer_that_differs_keeps_its_own_code(change: Callable[[Any], None], fits: bool) -> None:
    base, _, count = fused("llama", lambda model: change(model.model.layers[1]))
    assert count == base.num_layers - (not fits)
    own = decoder_layers(base)[1].forward
    assert isinstance(own, FusedLayer) is fits


def test_a_norm_with_a_hidden_offset_is_no_rms_norm() -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(64)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    _, _, count = fused("llama", lambda model: setattr(model.model.layers[0], "post_attention_layernorm", Offset()))
    assert count == 2


def test_a_model_that_gives_other_logits_fused_serves_as_before(caplog: pytest.LogCaptureFixture) -> None:
    base = describe(copy.deepcopy(tiny_model("llama")), tiny_tokenizer(), "tiny/llama")
    expected = expected_logits(base)
    context = prepare.prepare_model(base)
    attention = verify(base, context, expected, prepare.forward)
    caplog.set_level("INFO")
    wrong = {index: AttentionCall(scaling=3.0) for index in attention}
    prepare._fuse(base, context, expected, wrong)
    assert not any(isinstance(layer.forward, FusedLayer) for layer in decoder_layers(base))
    [record] = [record for record in caplog.records if record.message == "layers_not_fused"]
    assert "other logits" in record.__dict__["reason"]
    verify(base, context, expected, prepare.forward)
    prepare._fuse(base, context, expected, attention)
    assert all(isinstance(layer.forward, FusedLayer) for layer in decoder_layers(base))


def test_taken_apart_layers_have_their_own_code() -> None:
    base, context, _ = fused("llama")
    plain, own = prepared("llama")
    take_apart(decoder_layers(base))
    for found, wanted in zip(outputs(base, context, []), outputs(plain, own, []), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
