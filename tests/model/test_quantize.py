"""Quantised models: near to the exact one, adapters exact beside them, rows independent, memory freed."""

import gc
import weakref
from typing import Any

import pytest
import torch

from adapters_store.forms import BaseSpec
from server.engine.build import build_engine
from server.engine.limits import EngineLimits
from server.model.adapter_linear import AdapterLinear
from server.model.base import BaseModel
from server.model.errors import ModelLoadError
from server.model.loader import describe
from server.model.prepare import prepare_model
from server.model.quantize import Int8Linear, check_quantization
from server.model.step_context import StepContext
from tests.model.paged import attach_cache, plain_logits, random_requests, run, step
from tests.model.peft_pairs import lay_out, peft_model
from tests.support.models import VOCABULARY, tiny_model, tiny_tokenizer

RANKS = {"narrow": 1, "wide": 8}
SLOTS = {"narrow": 3, "wide": 2}
LENGTHS = [21, 14, 1, 18, 5]


def loaded(architecture: str, dtype: torch.dtype = torch.float32) -> BaseModel:
    return describe(tiny_model(architecture).to(dtype), tiny_tokenizer(), f"tiny/{architecture}")


def quantised(architecture: str) -> tuple[BaseModel, StepContext]:
    base = loaded(architecture)
    context = prepare_model(base, "int8")
    attach_cache(base, context)
    return base, context


def linears(base: BaseModel) -> dict[str, AdapterLinear]:
    return {name: module for name, module in base.model.named_modules() if isinstance(module, AdapterLinear)}


def state_bytes(base: BaseModel) -> int:
    tensors = [*base.model.parameters(), *base.model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "phi", "opt"])
def test_logits_stay_near(architecture: str) -> None:
    """Measured: cosine 0.997 in the mean and 0.978 at the worst position; random weights spread logits very wide."""
    base, context = quantised(architecture)
    requests = random_requests(LENGTHS, VOCABULARY, seed=1)
    exact = tiny_model(architecture)
    for request, found in zip(requests, run(base, context, requests, seed=2), strict=True):
        expected = plain_logits(exact, request.tokens)
        cosine = torch.cosine_similarity(found, expected, dim=-1)
        assert float(cosine.mean()) > 0.99
        assert float(cosine.min()) > 0.95
        divergence = torch.nn.functional.kl_div(
            found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        assert float(divergence) < 0.1
        assert not torch.equal(found, expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_linear_is_rounded_and_still_tells_its_weight(architecture: str) -> None:
    exact = loaded(architecture)
    base, _ = quantised(architecture)
    assert len(linears(base)) > 10
    for name, module in linears(base).items():
        assert isinstance(module.base, Int8Linear)
        before, after = exact.model.get_submodule(name).weight, module.weight
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        assert float((after - before).norm() / before.norm()) < 0.01
        if name == base.spec.head:
            assert after is base.model.get_input_embeddings().weight
            assert torch.equal(after, before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_beside_it_are_exact(architecture: str) -> None:
    """Each module alone: what an adapter adds is the same as beside the unrounded base."""
    base, context = quantised(architecture)
    oracle = peft_model(tiny_model(architecture), list(base.spec.modules), RANKS)
    lay_out(oracle, context, SLOTS)
    wide = [name for name in linears(base) if name != base.spec.head]
    requests = random_requests([3], VOCABULARY, seed=1, slots=[SLOTS["wide"]])
    step(base, context, requests, [3])  # leaves the step's segments in the context
    for name in wide:
        module = linears(base)[name]
        layer = oracle.get_submodule(f"base_model.model.{name}")
        x = torch.randn(1, 3, base.spec.modules[name].in_features)
        with torch.inference_mode():
            delta = layer.lora_B["wide"](layer.lora_A["wide"](x)) * layer.scaling["wide"]
            expected = module.base(x) + delta
            found = module(x)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, module.base(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_batched_equals_alone(architecture: str) -> None:
    """Rows of one step, with and without adapters, against the same rows in another order and in other chunks."""
    base, context = quantised(architecture)
    lay_out(peft_model(tiny_model(architecture), list(base.spec.modules), RANKS), context, SLOTS)
    slots = [SLOTS["wide"], None, SLOTS["narrow"], SLOTS["wide"], None]
    together = run(base, context, random_requests(LENGTHS, VOCABULARY, seed=1, slots=slots), seed=2)
    for request, found in zip(random_requests(LENGTHS, VOCABULARY, seed=1, slots=slots), together, strict=True):
        (alone,) = run(base, context, [request], seed=3)
        assert torch.equal(found.argmax(-1), alone.argmax(-1))
        assert torch.allclose(found, alone, rtol=1e-3, atol=2e-2)


def test_mutation_scales_of_two_layers_exchanged_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Int8Linear.__init__

    def wrong(self: Int8Linear, *arguments: Any) -> None:
        right(self, *arguments)
        self.scale = self.scale * (1 + torch.arange(len(self.scale)) % 2)

    monkeypatch.setattr(Int8Linear, "__init__", wrong)
    with pytest.raises(ModelLoadError, match="does not bear --quantize int8"):
        prepare_model(loaded("llama"), "int8")


@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)])
def test_the_weights_are_freed(tied: bool, dtype: torch.dtype) -> None:
    model = tiny_model("llama", hidden_size=192, intermediate_size=480, tie_word_embeddings=tied).to(dtype)
    base = describe(model, tiny_tokenizer(), "tiny/llama")
    before, embedding = state_bytes(base), base.model.get_input_embeddings().weight
    parameters = [base.model.get_submodule(name).weight for name in base.spec.modules]
    linear_bytes = sum(weight.nbytes for weight in parameters if weight is not embedding)
    weights = [weakref.ref(weight) for weight in parameters]
    del parameters
    values = sum(spec.in_features * spec.out_features for spec in base.spec.modules.values() if spec.kind == "linear")
    prepare_model(base, "int8")
    gc.collect()
    assert all(ref() is None or ref() is embedding for ref in weights)
    assert values < state_bytes(base) - (before - linear_bytes) < values * 1.1
    assert base.model.get_input_embeddings().weight.dtype == dtype
    assert base.dtype == dtype


def test_it_stays_the_same_base_for_adapters() -> None:
    spec: BaseSpec = loaded("llama").spec
    base, _ = quantised("llama")
    assert (base.spec, base.fingerprint) == (spec, spec.fingerprint)


def test_a_gpu_is_refused_in_plain_words() -> None:
    check_quantization("none", "cuda")
    check_quantization("int8", "cpu")
    with pytest.raises(ModelLoadError, match=r"CPU only.*cuda.*--device cpu"):
        check_quantization("int8", "cuda")
    with pytest.raises(ModelLoadError, match="Unknown quantization 'int3'"):
        prepare_model(loaded("llama"), "int3")


def test_the_engine_tells() -> None:
    limits = EngineLimits(1 << 20, 1 << 20)
    for kind in ("none", "int8"):
        assert (
            build_engine(loaded("llama"), limits, lambda _: pytest.fail("no adapters"), kind).info.quantization == kind
        )
