"""The committed example adapters: small, sane, finite, and able to do their task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from deploy.examples.base import BASE_ID
from deploy.examples.evaluate import ADAPTERS, SEED, in_process, score
from deploy.examples.tasks import TASKS
from deploy.examples.train import MAX_BYTES, RECIPES

LAYERS = 30
SIZES = {
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}


@pytest.fixture(params=sorted(TASKS))
def folder(request: pytest.FixtureRequest) -> Path:
    return ADAPTERS / str(request.param)


def test_one_folder_per_task() -> None:
    assert sorted(path.name for path in ADAPTERS.iterdir()) == sorted(TASKS)


def test_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES


def test_config(folder: Path) -> None:
    text = (folder / "adapter_config.json").read_text()
    config, recipe = json.loads(text), RECIPES[folder.name].lora
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == BASE_ID
    assert config["inference_mode"] is True
    assert config["target_modules"] == sorted(recipe["target_modules"])
    assert all(config[key] == value for key, value in recipe.items() if key != "target_modules")
    assert not [word for word in ("site-packages", "/home", ".gguf") if word in text]


def test_tensors(folder: Path) -> None:
    recipe = RECIPES[folder.name].lora
    expected = {}
    for layer in recipe.get("layers_to_transform", range(LAYERS)):
        for module in recipe["target_modules"]:
            block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            rank, (inner, outer) = recipe.get("rank_pattern", {}).get(module, recipe["r"]), SIZES[module]
            stem = f"base_model.model.model.layers.{layer}.{block}.{module}"
            expected[f"{stem}.lora_A.weight"] = (rank, inner)
            expected[f"{stem}.lora_B.weight"] = (outer, rank)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    for tensor in tensors.values():
        assert tensor.dtype == torch.bfloat16
        assert torch.isfinite(tensor).all()
        assert tensor.any()


def test_two_adapters_do_their_tasks() -> None:
    names = ["date-iso", "ticket-router"]
    answer = in_process(names, ADAPTERS)
    for name in names:
        result = score(TASKS[name], TASKS[name].items("heldout", 8, SEED), answer)
        assert result.base_right == 0
        assert result.adapter_right >= 7
