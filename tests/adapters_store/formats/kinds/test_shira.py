"""SHiRA against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ShiraConfig

from adapters_store.formats.kinds import shira
from adapters_store.forms import Sparse
from tests.adapters_store.formats.kinds.support import (
    check,
    check_damage,
    check_fields,
    edit_config,
    edit_tensors,
    imported,
    refused,
    trained,
)
from tests.support.dense_forms import matrix

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "opt": ["fc1", "v_proj"], "qwen2": ["k_proj", "up_proj"]}


def config(architecture: str, **options: Any) -> ShiraConfig:
    return ShiraConfig(task_type="CAUSAL_LM", **{"target_modules": TARGETS[architecture], "r": 2, **options})


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("rank", [1, 7])
def test_equals_peft(tmp_path: Path, architecture: str, rank: int) -> None:
    found = check(architecture, config(architecture, r=rank, random_seed=3), tmp_path)
    assert (found.kind, found.forms, found.rank) == ("shira", ("sparse",), {"min": 0, "max": 0})


def test_places_as_windows_writes_them(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    _, before = imported(tmp_path, base)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("shira_indices")]:
            tensors[name] = tensors[name].float()

    edit_tensors(tmp_path, widen)
    _, after = imported(tmp_path, base)
    for name, (form,) in before.modules.items():
        (other,) = after.modules[name]
        assert isinstance(form, Sparse)
        assert isinstance(other, Sparse)
        assert torch.equal(form.column, other.column)
        assert torch.equal(form.value, other.value)


def test_values_of_one_place_add_up(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama", target_modules=["v_proj"]), tmp_path)

    def together(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("shira_indices")]:
            tensors[name] = torch.tensor([[3], [5]]).expand_as(tensors[name]).to(torch.int32).contiguous()

    edit_tensors(tmp_path, together)
    _, weights = imported(tmp_path, base)
    (form,) = weights.modules["model.layers.2.self_attn.v_proj"]
    assert isinstance(form, Sparse)
    assert matrix(form, 64).nonzero().tolist() == [[3, 5]]


@pytest.mark.parametrize("place", [[-1, 0], [32, 0], [0, -1], [0, 64]])
def test_a_place_outside_is_refused(tmp_path: Path, place: list[int]) -> None:
    base, _ = trained("llama", config("llama", target_modules=["v_proj"]), tmp_path)

    def move(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("shira_indices"))
        tensors[name][:, 4] = torch.tensor(place)

    edit_tensors(tmp_path, move)
    refused(tmp_path, base, "bad_index", "outside")


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "shira_weight")


def test_more_entries_than_the_weight_has_are_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, r=10**12)
    refused(tmp_path, base, "bad_config", "trained entries")


def test_every_field_is_known() -> None:
    check_fields(shira.ShiraConfig, ShiraConfig)
