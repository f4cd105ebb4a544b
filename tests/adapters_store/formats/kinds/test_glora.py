"""GLoRA against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import GloraConfig

from adapters_store.formats.kinds import glora
from tests.adapters_store.formats.kinds.support import (
    check,
    check_damage,
    check_fields,
    edit_tensors,
    refused,
    trained,
)

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "opt": ["fc1", "v_proj"], "qwen2": ["k_proj", "up_proj"]}


def config(architecture: str, paths: tuple[str, str, str], **options: Any) -> GloraConfig:
    named = dict(zip(("config_A_B", "config_C", "config_D_E"), paths, strict=True))
    return GloraConfig(task_type="CAUSAL_LM", **{"target_modules": TARGETS[architecture], "r": 3, **named, **options})


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(
    "paths",
    [
        ("lora", "lora", "constant"),
        ("vector", "vector", "vector"),
        ("constant", "none", "constant"),
        ("vector", "none", "none"),
        ("lora", "vector", "none"),
    ],
)
def test_equals_peft(tmp_path: Path, architecture: str, paths: tuple[str, str, str]) -> None:
    found = check(architecture, config(architecture, paths), tmp_path)
    dense = paths[0] == "lora"
    assert (found.kind, found.forms) == ("glora", ("dense" if dense else "low_rank", "output_scale"))


def test_only_the_bias(tmp_path: Path) -> None:
    check("opt", config("opt", ("none", "lora", "vector")), tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_scale_of_zero_makes_it_dense(tmp_path: Path, architecture: str) -> None:
    def cut(name: str, parameter: torch.Tensor) -> None:
        parameter.normal_(0.0, 0.3)
        if "glora_A" in name:
            parameter[1] = -1

    found = check(architecture, config(architecture, ("vector", "vector", "vector")), tmp_path, cut)
    assert found.forms == ("dense", "output_scale")


def test_damage_is_refused(tmp_path: Path) -> None:
    parts = ("glora_A.Xd", "glora_B.Xu", "glora_C.X", "glora_D.X")
    check_damage("opt", config("opt", ("lora", "vector", "constant")), tmp_path, *parts)


def test_numbers_in_what_is_empty_are_refused(tmp_path: Path) -> None:
    base, _ = trained("opt", config("opt", ("none", "lora", "vector")), tmp_path)

    def fill(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("glora_A.zeros"))
        tensors[name] = torch.ones_like(tensors[name])

    edit_tensors(tmp_path, fill)
    refused(tmp_path, base, "bad_config", "glora_A.zeros")


def test_every_field_is_known() -> None:
    check_fields(glora.GloraConfig, GloraConfig)
