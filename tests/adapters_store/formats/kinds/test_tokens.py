"""Trainable tokens against PEFT, alone and beside a LoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig

from adapters_store.formats.kinds import tokens
from adapters_store.forms import Sparse
from tests.adapters_store.formats.kinds.support import (
    IDS,
    check,
    check_damage,
    check_fields,
    edit_config,
    edit_tensors,
    imported,
    refused,
    trained,
)

TOKENS = IDS[0, 3:17:2].tolist()
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "qwen2": "embed_tokens", "gemma": "embed_tokens"}
LORA = {"llama": ["q_proj"], "gpt2": ["c_attn"], "qwen2": ["up_proj"], "gemma": ["v_proj"]}


def alone(architecture: str, **options: Any) -> TrainableTokensConfig:
    options = {"token_indices": TOKENS, "target_modules": [EMBEDDING[architecture]], **options}
    return TrainableTokensConfig(task_type="CAUSAL_LM", **options)


def beside(architecture: str, **options: Any) -> LoraConfig:
    options = {"trainable_token_indices": TOKENS, "target_modules": LORA[architecture], "r": 3, **options}
    return LoraConfig(task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("architecture", EMBEDDING)
def test_alone_equals_peft(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, alone(architecture), tmp_path)
    assert (found.kind, found.forms) == ("trainable_tokens", ("sparse",))
    assert found.modules["matched"] == (1 if architecture == "qwen2" else 2)  # with the tied head


def test_without_named_modules(tmp_path: Path) -> None:
    check("llama", alone("llama", target_modules=None), tmp_path)


def test_a_head_of_its_own(tmp_path: Path) -> None:
    check("qwen2", alone("qwen2", target_modules=["lm_head"]), tmp_path)
    check("qwen2", alone("qwen2", target_modules=["embed_tokens", "lm_head"]), tmp_path / "both")


@pytest.mark.parametrize("architecture", EMBEDDING)
def test_beside_a_lora_equals_peft(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, beside(architecture), tmp_path)
    assert (found.kind, found.forms) == ("lora_tokens", ("low_rank", "sparse"))


@pytest.mark.parametrize(
    ("architecture", "rows"),
    [
        ("llama", {"embed_tokens": TOKENS}),
        ("llama", {"embed_tokens": TOKENS, "lm_head": TOKENS}),
        ("llama", {"embed_tokens": TOKENS, "lm_head": TOKENS[:2]}),
        ("qwen2", {"embed_tokens": TOKENS, "lm_head": TOKENS[:2]}),
        ("qwen2", {"lm_head": TOKENS}),
    ],
)
def test_rows_by_module(tmp_path: Path, architecture: str, rows: dict[str, list[int]]) -> None:
    check(architecture, beside(architecture, trainable_token_indices=rows), tmp_path)


def test_damage_is_refused(tmp_path: Path) -> None:
    both = alone("qwen2", target_modules=["embed_tokens", "lm_head"])
    check_damage("qwen2", both, tmp_path, "trainable_tokens_delta", alone=True)
    check_damage("llama", beside("llama"), tmp_path, "lora_A.weight", "lora_B.weight")


@pytest.mark.parametrize("rows", [[], [1, 1], [-1], [320]])
def test_tokens_that_are_none_are_refused(tmp_path: Path, rows: list[int]) -> None:
    base, _ = trained("llama", alone("llama"), tmp_path)
    edit_config(tmp_path, token_indices=rows)
    refused(tmp_path, base, "bad_config", "trained tokens")


def test_beside_a_lora_tokens_must_be_there_and_fit(tmp_path: Path) -> None:
    base, _ = trained("llama", beside("llama"), tmp_path)
    edit_config(tmp_path, trainable_token_indices=TOKENS[:3])
    refused(tmp_path, base, "shape_mismatch", "trainable_tokens_delta")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "trainable_tokens" in name]:
            del tensors[name]

    edit_config(tmp_path, trainable_token_indices=TOKENS)
    edit_tensors(tmp_path, drop)
    refused(tmp_path, base, "shape_mismatch", "trained tokens")


def test_rows_of_a_tied_head_are_those_of_its_embedding(tmp_path: Path) -> None:
    base, _ = trained("llama", alone("llama"), tmp_path)

    def part(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "lm_head" in name)
        tensors[name] = tensors[name] + 1

    edit_tensors(tmp_path, part)
    refused(tmp_path, base, "shape_mismatch", "lm_head")


def test_only_the_named_rows_change(tmp_path: Path) -> None:
    base, _ = trained("llama", alone("llama"), tmp_path)
    _, weights = imported(tmp_path, base)
    for name in ("model.embed_tokens", "lm_head"):
        (form,) = weights.modules[name]
        assert isinstance(form, Sparse)
        assert form.start.diff().nonzero().flatten().tolist() == sorted(TOKENS)


def test_every_field_is_known() -> None:
    check_fields(tokens.TrainableTokensConfig, TrainableTokensConfig)
