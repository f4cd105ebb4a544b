"""The digest of a base model: the same for one checkpoint in every dtype, another for other weights or shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.model.fingerprint import SAMPLES, fingerprint
from tests.support.models import tiny_model


def of(model: Any) -> str:
    return fingerprint(model, model.config)


def bf16_checkpoint(dtype: torch.dtype) -> Any:
    return tiny_model("llama").to(torch.bfloat16).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_one_checkpoint_has_one_fingerprint(dtype: torch.dtype) -> None:
    assert of(bf16_checkpoint(dtype)) == of(bf16_checkpoint(torch.bfloat16))


def test_a_float32_checkpoint_held_in_bfloat16_keeps_its_fingerprint() -> None:
    assert of(tiny_model("llama").to(torch.bfloat16)) == of(tiny_model("llama"))


def test_form_and_repeatability() -> None:
    found = of(tiny_model("gpt2"))
    assert found.startswith("sha256:")
    assert len(found) == 7 + 64
    assert found == of(tiny_model("gpt2"))


def _other_first(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] += 0.5


def _other_last(model: Any) -> None:
    model.lm_head.weight.data[-1, -1] += 0.5


def _other_norm(model: Any) -> None:
    model.model.norm.weight.data[7] += 0.5


def _other_theta(model: Any) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 12345.0}


@pytest.mark.parametrize("change", [_other_first, _other_last, _other_norm, _other_theta])
def test_any_sampled_change_shows(change: Callable[[Any], None]) -> None:
    model = tiny_model("qwen3")
    before = of(model)
    change(model)
    assert of(model) != before


def test_other_seeds_shapes_and_architectures_differ() -> None:
    models = [
        tiny_model("llama"),
        tiny_model("llama", seed=1),
        tiny_model("llama", num_hidden_layers=2),
        tiny_model("mistral"),
        tiny_model("mistral", sliding_window=13),
    ]
    assert len({of(model) for model in models}) == len(models)


def test_a_trained_change_of_a_large_matrix_shows_though_it_is_sampled() -> None:
    model = tiny_model("llama")
    weight = model.model.embed_tokens.weight
    assert weight.numel() > SAMPLES
    before = of(model)
    weight.data += torch.randn_like(weight) * 0.01
    assert of(model) != before


def test_the_strides_of_a_weight_do_not_matter() -> None:
    model = tiny_model("llama")
    before = of(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    assert of(model) == before
