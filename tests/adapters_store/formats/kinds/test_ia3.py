"""IA3 against PEFT."""

from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config

from adapters_store.formats.kinds.ia3 import Ia3Config
from tests.adapters_store.formats.kinds.support import (
    check,
    check_damage,
    check_fields,
    edit_config,
    refused,
    trained,
)

TARGETS = {"llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]), "gpt2": (["c_attn", "c_fc"], ["c_fc"])}
TARGETS["qwen2"] = TARGETS["llama"]


def config(architecture: str, **options: Any) -> IA3Config:
    targets, inputs = TARGETS[architecture]
    return IA3Config(task_type="CAUSAL_LM", **{"target_modules": targets, "feedforward_modules": inputs, **options})


@pytest.mark.parametrize("architecture", TARGETS)
def test_equals_peft(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, config(architecture), tmp_path)
    assert (found.kind, found.forms) == ("ia3", ("input_transform", "output_scale"))


def test_outputs_only(tmp_path: Path) -> None:
    assert check("qwen2", config("qwen2", feedforward_modules=[]), tmp_path).forms == ("output_scale",)


def test_a_pattern_says_which_are_scaled_on_inputs(tmp_path: Path) -> None:
    check(
        "llama", config("llama", feedforward_modules=r".*down_proj", target_modules=r".*(v_proj|down_proj)"), tmp_path
    )


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "k_proj.ia3_l", "down_proj.ia3_l", alone=True)


def test_shapes_and_config_must_agree(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, feedforward_modules=["v_proj"])
    refused(tmp_path, base, "bad_config", "feedforward_modules")


def test_every_field_is_known() -> None:
    check_fields(Ia3Config, IA3Config)
