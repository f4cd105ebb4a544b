"""DoRA against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.adapters_store.formats.kinds.support import (
    check,
    check_damage,
    edit_config,
    edit_tensors,
    imported,
    refused,
    trained,
)

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "qwen2": ["k_proj", "up_proj"]}


def config(architecture: str, **options: Any) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[architecture], **options}
    return LoraConfig(task_type="CAUSAL_LM", use_dora=True, **options)


def change(name: str, parameter: torch.Tensor) -> None:
    """The magnitudes stay about where they were, either way of it."""
    if "magnitude" in name:
        parameter.mul_(1 + torch.empty_like(parameter).normal_(0.0, 0.3))
    else:
        parameter.normal_(0.0, 0.3)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("rank", [1, 5])
def test_equals_peft(tmp_path: Path, architecture: str, rank: int) -> None:
    found = check(architecture, config(architecture, r=rank), tmp_path, change)
    assert (found.kind, found.forms) == ("dora", ("low_rank", "output_scale"))
    assert found.rank == {"min": rank, "max": rank}


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_embeddings_are_scaled_after_their_norms(tmp_path: Path, architecture: str) -> None:
    check(architecture, config("llama", target_modules=["embed_tokens", "v_proj"]), tmp_path, change)


def test_ranks_and_alphas_by_pattern(tmp_path: Path) -> None:
    options = {"rank_pattern": {"v_proj": 7}, "alpha_pattern": {"q_proj": 11}, "use_rslora": True}
    assert check("llama", config("llama", **options), tmp_path, change).rank == {"min": 4, "max": 7}


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("qwen2", config("qwen2"), tmp_path, "lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def test_a_row_of_no_length_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama", target_modules=["v_proj"]), tmp_path)
    with torch.no_grad():
        base.model.layers[1].self_attn.v_proj.weight[3] = 0

    def nothing(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("lora_B.weight"):
                tensors[name] = torch.zeros_like(tensors[name])

    edit_tensors(tmp_path, nothing)
    refused(tmp_path, base, "nonfinite_weights", "layers.1")


@pytest.mark.parametrize(
    "more",
    [
        {"lora_bias": True},
        {"bias": "all"},
        {"trainable_token_indices": [1]},
        {"arrow_config": {"top_k": 3}},
        {"ensure_weight_tying": True},
        {"init_lora_weights": "pissa"},
    ],
)
def test_what_is_beside_it_and_not_served_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, **more)
    refused(tmp_path, base, "feature_unsupported", next(iter(more)))


def test_the_base_may_keep_no_weights(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    assert imported(tmp_path, base)[0].kind == "dora"
