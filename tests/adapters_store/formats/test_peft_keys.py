"""Tensor names: PEFT's spellings and those of older releases and other trainers."""

import pytest
import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.formats.peft_keys import Key, group, split
from adapters_store.safetensors_header import TensorEntry

OURS = [f"model.layers.{n}.self_attn.{m}_proj" for n in range(2) for m in "qv"] + ["lm_head", "model.embed_tokens"]
Q = "model.layers.0.self_attn.q_proj"


def entries(*names: str) -> list[TensorEntry]:
    return [TensorEntry(name, torch.float32, (1, 1), 0, 4) for name in names]


def refusal(*names: str) -> tuple[str, str]:
    with pytest.raises(AdapterInvalid) as caught:
        group(entries(*names), OURS)
    return caught.value.code, caught.value.message


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (f"base_model.model.{Q}.lora_A.weight", Key(Q, "A")),
        (f"base_model.model.{Q}.lora_B.weight", Key(Q, "B")),
        (f"base_model.model.{Q}.lora_B.bias", Key(Q, "bias")),
        (f"base_model.model.{Q}.lora_A.default.weight", Key(Q, "A", "default")),
        (f"base_model.model.{Q}.lora_B.my-adapter.bias", Key(Q, "bias", "my-adapter")),
        ("base_model.model.model.embed_tokens.lora_embedding_A", Key("model.embed_tokens", "embedding_A")),
        ("base_model.model.model.embed_tokens.lora_embedding_B.x", Key("model.embed_tokens", "embedding_B", "x")),
        ("base_model.model.lm_head.base_layer.weight", Key("lm_head", "base.weight")),
        ("base_model.model.lm_head.weight", Key("lm_head", "whole.weight")),
        ("base_model.model.lm_head.bias", Key("lm_head", "whole.bias")),
        ("base_model.model.lm_head.modules_to_save.weight", Key("lm_head", "whole.weight")),
        ("base_model.model.lm_head.modules_to_save.default.weight", Key("lm_head", "whole.weight", "default")),
        (f"{Q}.lora_A.weight", Key(Q, "A")),
        (f"_orig_mod.base_model.model.{Q}.lora_A.weight", Key(Q, "A")),
        (f"base_model.model._orig_mod.{Q}.lora_A.weight", Key(Q, "A")),
        (f"module.base_model.model.{Q}.lora_A.weight", Key(Q, "A")),
    ],
)
def test_known_spellings(name: str, key: Key) -> None:
    assert split(name) == key


@pytest.mark.parametrize(
    "name",
    [
        f"base_model.model.{Q}.lora_A",
        f"base_model.model.{Q}.lora_A.bias",
        f"base_model.model.{Q}.lora_A.a.b.weight",
        f"base_model.model.{Q}.lora_A.weight.quant_state",
        f"base_model.model.{Q}.lora_down.scale",
        f"base_model.model.{Q}.alpha",
        f"base_model.model.{Q}.base_layer.weight.absmax",
        "weight",
        "",
        "lora_unet_down_blocks_0",
    ],
)
def test_unknown_spellings_are_refused_by_name(name: str) -> None:
    code, message = refusal(name)
    assert code == "bad_tensor_entry"
    assert f"`{name}`" in message


@pytest.mark.parametrize(
    "part", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_E", "lora_diag.weight"]
)
def test_parts_of_other_methods_are_unserved(part: str) -> None:
    assert refusal(f"base_model.model.{Q}.{part}")[0] == "feature_unsupported"


def test_groups_by_module() -> None:
    grouped, outer = group(entries(f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"), OURS)
    assert outer == ""
    assert {name: sorted(found.parts) for name, found in grouped.items()} == {Q: ["A", "B"]}


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.", "", "module."])
def test_a_model_trained_without_its_head_is_found(prefix: str) -> None:
    names = [f"{prefix}layers.{n}.self_attn.{m}_proj.lora_A.weight" for n in range(2) for m in "qv"]
    grouped, outer = group(entries(*names), OURS)
    assert outer == "model."
    assert sorted(grouped) == sorted(OURS[:4])


def test_a_short_name_that_fits_twice_is_refused() -> None:
    with pytest.raises(AdapterInvalid) as caught:
        group(entries("q_proj.lora_A.weight"), OURS)
    assert caught.value.code == "no_modules_matched"


def test_nothing_in_common_names_both_sides() -> None:
    code, message = refusal(*[f"base_model.model.transformer.h.{n}.attn.c_attn.lora_A.weight" for n in range(5)])
    assert code == "no_modules_matched"
    assert message.count("transformer.h.") == 3
    assert message.count("model.layers.") + message.count("lm_head") + message.count("embed_tokens") == 3


def test_no_tensors_at_all() -> None:
    assert refusal()[0] == "no_modules_matched"


def test_a_deeper_model_is_another_base() -> None:
    code, message = refusal(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", "model.layers.9.self_attn.q_proj.lora_A.weight")
    assert code == "base_mismatch"
    assert "model.layers.9.self_attn.q_proj" in message


def test_two_spellings_of_one_factor() -> None:
    code, message = refusal(f"base_model.model.{Q}.lora_A.weight", f"{Q}.lora_A.weight")
    assert code == "bad_tensor_entry"
    assert "same factor" in message


def test_two_adapters_in_one_file() -> None:
    code, message = refusal(f"{Q}.lora_A.one.weight", f"{Q}.lora_B.two.weight")
    assert code == "bad_tensor_entry"
    assert "`one`, `two`" in message
