"""FRoD against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import FrodConfig
from peft.tuners.frod.model import _category_from_key

from adapters_store.formats.kinds import frod
from tests.adapters_store.formats.kinds.support import (
    TARGETS,
    check,
    check_damage,
    check_fields,
    edit_config,
    edit_tensors,
    options,
    refused,
    trained,
)


def config(architecture: str, **further: Any) -> FrodConfig:
    return FrodConfig(**options(architecture, **{"sparse_rate": 0.05, "progressbar": False, **further}))


@pytest.mark.parametrize("architecture", TARGETS)
def test_equals_peft(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, config(architecture), tmp_path)
    assert (found.kind, found.forms) == ("frod", ("dense",))


def test_damage_is_refused(tmp_path: Path) -> None:
    parts = ("frod_lambda_l", "frod_lambda_s_values", "frod_V.self_attn_q_proj")
    check_damage("llama", config("llama"), tmp_path, *parts)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3, 1)])
def test_places_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    place = torch.zeros(shape, dtype=torch.int64)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"base_model.frod_s_indices.self_attn_q_proj": place}))
    refused(tmp_path, base, "shape_mismatch")


@pytest.mark.parametrize("place", [-1, 64])
def test_a_place_beyond_the_core_is_refused(tmp_path: Path, place: int) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)

    def beyond(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.frod_s_indices.self_attn_q_proj"][1, 0] = place

    edit_tensors(tmp_path, beyond)
    refused(tmp_path, base, "bad_index", match="beyond")


def test_a_basis_that_is_not_saved_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, save_projection=False)
    refused(tmp_path, base, "feature_unsupported", match="save_projection")


@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "layers.0.proj",
        "model.layers.3.self_attn.q_proj",
        "layer.1.attention.output.dense",
        "layer.1.output.dense",
    ],
)
def test_modules_share_a_basis_as_in_peft(name: str) -> None:
    assert frod.category(name) == _category_from_key(name)


def test_every_field_is_known() -> None:
    check_fields(frod.FrodConfig, FrodConfig)
