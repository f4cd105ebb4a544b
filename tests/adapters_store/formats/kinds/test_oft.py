"""OFT against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig

from adapters_store.formats.kinds import oft
from adapters_store.forms import InputTransform
from tests.adapters_store.formats.kinds.support import (
    check,
    check_damage,
    check_fields,
    edit_config,
    imported,
    refused,
    trained,
)

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "opt": ["fc1", "v_proj"], "qwen2": ["k_proj", "up_proj"]}


def config(architecture: str, **options: Any) -> OFTConfig:
    options = {"oft_block_size": 8, "target_modules": TARGETS[architecture], **options}
    return OFTConfig(task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("neumann", [True, False])
def test_equals_peft(tmp_path: Path, architecture: str, neumann: bool) -> None:
    found = check(architecture, config(architecture, use_cayley_neumann=neumann), tmp_path)
    assert (found.kind, found.forms) == ("oft", ("input_transform",))


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "oft_block_size": 0},
        {"r": 5, "oft_block_size": 0},
        {"oft_block_size": 7},
        {"oft_block_size": 1000},
        {"block_share": True},
        *({"num_cayley_neumann_terms": terms} for terms in (2, 3, 4, 7)),
    ],
)
def test_blocks_and_terms(tmp_path: Path, options: dict[str, Any]) -> None:
    check("llama", config("llama", **options), tmp_path)


@pytest.mark.parametrize("share", [True, False])
def test_constrained(tmp_path: Path, share: bool) -> None:
    check("llama", config("llama", coft=True, eps=0.7, block_share=share), tmp_path)


def test_a_turn_keeps_lengths(tmp_path: Path) -> None:
    """What PEFT's exact Cayley form is for; the series only comes near."""
    base, _ = trained("llama", config("llama", use_cayley_neumann=False), tmp_path)
    _, weights = imported(tmp_path, base)
    (form,) = weights.modules["model.layers.0.mlp.down_proj"]
    eye = torch.eye(8).expand(12, 8, 8)
    assert isinstance(form, InputTransform)
    torch.testing.assert_close(form.blocks @ form.blocks.mT, eye, rtol=0, atol=1e-5)


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "oft_R.weight", alone=True)


@pytest.mark.parametrize(
    ("change", "code", "match"),
    [
        ({"bias": "all"}, "feature_unsupported", "bias"),
        ({"r": 4}, "bad_config", "oft_block_size"),
        ({"num_cayley_neumann_terms": 10**9}, "feature_unsupported", "num_cayley"),
        ({"peft_version": "0.17.1"}, "feature_unsupported", "0.18"),
        ({"peft_version": None}, "feature_unsupported", "peft_version"),
        ({"oft_block_size": 1}, "bad_config", "blocks of one"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, change: dict[str, Any], code: str, match: str) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, **change)
    refused(tmp_path, base, code, match)


def test_an_embedding_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama", target_modules=["embed_tokens", "q_proj"]), tmp_path)
    refused(tmp_path, base, "feature_unsupported", "embed_tokens")


def test_every_field_is_known() -> None:
    check_fields(oft.OftConfig, OFTConfig)
