"""LayerNorm tuning against PEFT."""

from pathlib import Path

import pytest
import torch
from peft import LNTuningConfig

from adapters_store.formats.kinds import ln_tuning
from tests.adapters_store.formats.kinds.support import check, check_damage, check_fields, refused, trained
from tests.support.models import tiny_model

TARGETS = {
    "llama": ["input_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_f"],
    "qwen2": ["post_attention_layernorm"],
    "gemma": ["input_layernorm", "norm"],
    "olmo2": ["post_feedforward_layernorm"],
}


def config(architecture: str) -> LNTuningConfig:
    return LNTuningConfig(task_type="CAUSAL_LM", target_modules=TARGETS[architecture])


@pytest.mark.parametrize("architecture", TARGETS)
def test_equals_peft(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, config(architecture), tmp_path)
    assert (found.kind, found.forms) == ("ln_tuning", ("output_scale",))
    names = [name.rpartition(".")[2] for name, _ in tiny_model(architecture).named_modules()]
    assert found.modules["matched"] == sum(name in TARGETS[architecture] for name in names)


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("gpt2", config("gpt2"), tmp_path, "ln_tuning_layers.weight", "ln_tuning_layers.bias")


def test_a_weight_of_zero_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    with torch.no_grad():
        base.model.norm.weight[3] = 0
    refused(tmp_path, base, "shape_mismatch", "model.norm")


def test_every_field_is_known() -> None:
    check_fields(ln_tuning.LnTuningConfig, LNTuningConfig)
