"""Super-Tuning against PEFT."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import SupertuningConfig

from adapters_store.errors import AdapterInvalid
from adapters_store.formats import importer, peft
from adapters_store.formats.kinds import supertuning
from tests.adapters_store.formats.kinds.support import (
    LIMITS,
    check,
    check_damage,
    check_fields,
    edit_config,
    edit_tensors,
    refused,
    trained,
)
from tests.adapters_store.support import spec_of

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "opt": ["fc1", "v_proj"], "qwen2": ["k_proj", "up_proj"]}


def config(architecture: str, **options: Any) -> SupertuningConfig:
    options = {"target_modules": TARGETS[architecture], "sparsity": 0.97, **options}
    return SupertuningConfig(task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("options", [{}, {"select_top": False, "sparsity": 0.5}])
def test_equals_peft(tmp_path: Path, architecture: str, stored: bool, options: dict[str, Any]) -> None:
    found = check(architecture, config(architecture, save_precomputed_indices=stored, **options), tmp_path)
    assert (found.kind, found.forms) == ("supertuning", ("sparse",))


@pytest.mark.parametrize("options", [{"r": 3}, {"r": 5, "lora_alpha": 3.0}])
def test_with_a_lora(tmp_path: Path, options: dict[str, Any]) -> None:
    found = check("llama", config("llama", **options), tmp_path)
    assert (found.forms, found.rank["max"]) == (("low_rank", "sparse"), options["r"])


def test_damage_is_refused(tmp_path: Path) -> None:
    parts = ("supertuning_values", "supertuning_lora_A.weight", "supertuning_lora_B.weight")
    check_damage("llama", config("llama", r=3), tmp_path, *parts)


@pytest.mark.parametrize("place", [-1, 64 * 32])
def test_a_place_outside_is_refused(tmp_path: Path, place: int) -> None:
    base, _ = trained("llama", config("llama", target_modules=["v_proj"]), tmp_path)

    def move(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("supertuning_indices"))
        tensors[name][4] = place

    edit_tensors(tmp_path, move)
    refused(tmp_path, base, "bad_index", "outside")


def test_equal_magnitudes_without_stored_places_are_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama", save_precomputed_indices=False), tmp_path)
    with torch.no_grad():
        base.model.layers[0].self_attn.v_proj.weight[:, :5] = 7.0
    refused(tmp_path, base, "feature_unsupported", "save_precomputed_indices")


def test_places_cannot_be_found_in_rounded_weights(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama", save_precomputed_indices=False), tmp_path)
    rounded = replace(spec_of(base), rounded=True)
    with pytest.raises(AdapterInvalid, match="quantize none") as caught:
        importer.inspect((tmp_path / peft.CONFIG_FILE).read_bytes(), tmp_path / peft.WEIGHTS_FILE, rounded, LIMITS)
    assert caught.value.code == "feature_unsupported"


@pytest.mark.parametrize("change", [{"sparsity": 1.0}, {"sparsity": -0.5}])
def test_a_share_outside_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, **change)
    refused(tmp_path, base, "bad_config", "sparsity")


def test_every_field_is_known() -> None:
    check_fields(supertuning.SupertuningConfig, SupertuningConfig)
