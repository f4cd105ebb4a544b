"""Prompt methods against PEFT: virtual tokens as embeddings, and as keys and values."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

from adapters_store.formats import importer, peft
from adapters_store.formats.kinds import prompts
from adapters_store.variants import Variant
from tests.adapters_store.formats.kinds.support import (
    IDS,
    LIMITS,
    check,
    check_fields,
    edit_config,
    edit_tensors,
    imported,
    refused,
    trained,
)
from tests.adapters_store.support import spec_of
from tests.support import dense_forms

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma"]
CPT: dict[str, Any] = {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}


def prompt(kind: str, count: int = 3) -> PeftConfig:
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": count}
    match kind:
        case "prompt_tuning":
            return PromptTuningConfig(**options)
        case "p_tuning":
            return PromptEncoderConfig(**options, encoder_hidden_size=24)
        case "p_tuning lstm":
            return PromptEncoderConfig(**options, encoder_reparameterization_type="LSTM", encoder_hidden_size=24)
        case "prefix_tuning":
            return PrefixTuningConfig(**options)
        case "prefix_tuning projected":
            return PrefixTuningConfig(**options, prefix_projection=True, encoder_hidden_size=24)
        case "cartridge":
            return CartridgeConfig(**options)
        case _:
            return CPTConfig(**CPT, task_type="CAUSAL_LM")


def everything(name: str, parameter: torch.Tensor) -> None:
    parameter.normal_(0.0, 0.5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning", "prefix_tuning", "prefix_tuning projected", "cartridge"])
def test_equals_peft(tmp_path: Path, architecture: str, kind: str) -> None:
    found = check(architecture, prompt(kind), tmp_path, everything)
    assert (found.kind, found.forms) == (kind.split()[0], ("context",))


@pytest.mark.parametrize("kind", ["p_tuning lstm", "cpt"])
def test_other_encoders(tmp_path: Path, kind: str) -> None:
    assert check("llama", prompt(kind), tmp_path, everything).kind == kind.split()[0]


@pytest.mark.parametrize("count", [1, 9])
def test_as_many_tokens_as_there_are(tmp_path: Path, count: int) -> None:
    base, _ = trained("llama", prompt("prefix_tuning", count), tmp_path)
    context = imported(tmp_path, base)[1].context
    assert context is not None
    assert context.keys is not None
    assert (context.num_tokens, context.keys.shape) == (count, (3, count, 2, 16))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_task_of_several(tmp_path: Path, architecture: str) -> None:
    options = {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 2}
    base, adapted = trained(architecture, MultitaskPromptTuningConfig(task_type="CAUSAL_LM", **options), tmp_path)
    config, weights, spec = (tmp_path / peft.CONFIG_FILE).read_bytes(), tmp_path / peft.WEIGHTS_FILE, spec_of(base)
    assert importer.inspect(config, weights, spec, LIMITS).kind == "multitask_prompt_tuning"
    loader, found = importer.Loader(spec, LIMITS), []
    for task in (None, 1):
        with torch.inference_mode():
            expected = adapted(IDS, task_ids=torch.tensor([task or 0])).logits[:, -IDS.shape[1] :]
        found.append(dense_forms.logits(base, loader.load(config, weights, "d" * 64, Variant(task=task)), IDS))
        torch.testing.assert_close(found[-1], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(found[0], found[1], atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "change", "code", "match"),
    [
        ("prompt_tuning", {"modules_to_save": ["lm_head"]}, "feature_unsupported", "lm_head"),
        ("prompt_tuning", {"num_transformer_submodules": 2}, "feature_unsupported", "submodules"),
        ("prompt_tuning", {"task_type": "SEQ_CLS"}, "feature_unsupported", "SEQ_CLS"),
        ("prompt_tuning", {"num_virtual_tokens": 4}, "shape_mismatch", "prompt_embeddings"),
        ("prompt_tuning", {"num_virtual_tokens": 0}, "bad_config", "num_virtual_tokens"),
        ("prompt_tuning", {"token_dim": 32}, "base_mismatch", "32"),
        ("prompt_tuning", {"made_up": 1}, "bad_config", "made_up"),
        ("prefix_tuning", {"num_layers": 4}, "base_mismatch", "layers"),
        ("prefix_tuning", {"num_attention_heads": 4}, "base_mismatch", "heads"),
        ("cartridge", {"token_dim": 64}, "base_mismatch", "64"),
        ("cartridge", {"num_virtual_tokens": 10**15}, "shape_mismatch", "prompt_embeddings"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, kind: str, change: dict[str, Any], code: str, match: str) -> None:
    base, _ = trained("llama", prompt(kind), tmp_path)
    edit_config(tmp_path, **change)
    refused(tmp_path, base, code, match)


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_damage_is_refused(tmp_path: Path, kind: str) -> None:
    base, _ = trained("llama", prompt(kind), tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["prompt_embeddings"][0, 3] = float("nan")

    edit_tensors(tmp_path, spoil)
    refused(tmp_path, base, "nonfinite_weights", "prompt_embeddings")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["something"] = tensors.pop("prompt_embeddings")

    edit_tensors(tmp_path, rename)
    refused(tmp_path, base, "bad_tensor_entry", "something")


def test_every_field_is_known() -> None:
    check_fields(prompts.PromptTuningConfig, PromptTuningConfig)
    check_fields(prompts.PromptEncoderConfig, PromptEncoderConfig)
    check_fields(prompts.MultitaskConfig, MultitaskPromptTuningConfig)
    check_fields(prompts.CptConfig, CPTConfig)
    check_fields(prompts.PrefixTuningConfig, PrefixTuningConfig)
    check_fields(prompts.CartridgeConfig, CartridgeConfig)
