"""BOFT against PEFT; more than one factor against the pieces of PEFT's layer, which needs CUDA for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BOFTConfig
from peft.tuners.boft.layer import BOFTLayer

from adapters_store.formats.kinds.boft import BoftConfig
from adapters_store.forms import InputTransform
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

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "opt": ["fc1", "v_proj"], "qwen2": ["k_proj", "up_proj"]}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT tells that it has no CUDA extension


def config(architecture: str, **options: Any) -> BOFTConfig:
    return BOFTConfig(task_type="CAUSAL_LM", **{"target_modules": TARGETS[architecture], **options})


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("options", [{"boft_block_size": 8}, {"boft_block_size": 0, "boft_block_num": 4}])
def test_equals_peft(tmp_path: Path, architecture: str, options: dict[str, Any]) -> None:
    found = check(architecture, config(architecture, **options), tmp_path)
    assert (found.kind, found.forms) == ("boft", ("input_transform", "output_scale"))


def test_a_config_of_more_factors_than_the_file_has(tmp_path: Path) -> None:
    check("llama", config("llama", boft_n_butterfly_factor=2), tmp_path)


@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("size", [2, 4])
def test_butterflies(tmp_path: Path, factors: int, size: int) -> None:
    options = {"boft_block_size": size, "boft_n_butterfly_factor": factors, "target_modules": ["q_proj"]}
    base, _ = trained("llama", config("llama", **options), tmp_path)
    numbers = torch.randn(factors, 64 // size, size, size)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("boft_R"):
                tensors[name] = numbers.clone()

    edit_tensors(tmp_path, widen)
    _, weights = imported(tmp_path, base)
    form = weights.modules["model.layers.0.self_attn.q_proj"][0]
    assert isinstance(form, InputTransform)
    assert form.blocks.shape[1] == size * 2 ** (factors - 1)
    x = torch.randn(5, 64)
    ours = torch.einsum("tnj,nij->tni", x.view(5, *form.blocks.shape[:2]), form.blocks).flatten(1)
    torch.testing.assert_close(ours, x @ _theirs(numbers), rtol=1e-4, atol=1e-4)


def _theirs(numbers: torch.Tensor) -> torch.Tensor:
    """`butterfly_oft_mat` of `peft.tuners.boft.layer`, [64, 64]."""
    layer: Any = object.__new__(BOFTLayer)
    factors, count, size, _ = numbers.shape
    found = torch.eye(64)
    for index in range(factors):
        order = BOFTLayer.block_butterfly_perm(layer, 64, int(count / 2**index), int(size / 2), factors - 1)
        permute = BOFTLayer.perm2mat(layer, order)
        turned = torch.block_diag(*BOFTLayer.cayley_batch(layer, numbers[index]))  # type: ignore[no-untyped-call]
        found = permute @ turned @ permute.T @ found
    return found


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "boft_s")
    check_damage("llama", config("llama", boft_n_butterfly_factor=3), tmp_path, "boft_R")


@pytest.mark.parametrize(
    ("change", "code", "match"),
    [
        ({"bias": "boft_only"}, "feature_unsupported", "bias"),
        ({"boft_block_num": 4}, "bad_config", "boft_block_size"),
        ({"boft_block_size": 5}, "bad_config", "blocks"),
        ({"boft_n_butterfly_factor": 0}, "bad_config", "butterfly"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, change: dict[str, Any], code: str, match: str) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, **change)
    refused(tmp_path, base, code, match)


def test_every_field_is_known() -> None:
    check_fields(BoftConfig, BOFTConfig)
