"""VB-LoRA against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VBLoRAConfig

from adapters_store.formats.kinds import vblora
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


def config(architecture: str, **further: Any) -> VBLoRAConfig:
    return VBLoRAConfig(**options(architecture, **{"r": 3, "num_vectors": 12, "vector_length": 16, **further}))


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(("topk", "only_top"), [(1, False), (2, False), (3, True)])
def test_equals_peft(tmp_path: Path, architecture: str, topk: int, only_top: bool) -> None:
    found = check(architecture, config(architecture, topk=topk, save_only_topk_weights=only_top), tmp_path)
    assert (found.kind, found.forms, found.rank) == ("vblora", ("low_rank",), {"min": 3, "max": 3})


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "vblora_logits_A", "vblora_logits_B", "vblora_vector_bank")


def test_a_vector_beyond_the_bank_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama", save_only_topk_weights=True), tmp_path)

    def beyond(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("logits_A_topk_indices"))
        tensors[name][0, 0, 0] = 12

    edit_tensors(tmp_path, beyond)
    refused(tmp_path, base, "bad_index", match="outside 0 to 11")


@pytest.mark.parametrize("changes", [{"topk": 0}, {"topk": 13}, {"vector_length": 0}])
def test_numbers_that_mean_nothing_are_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, **changes)
    refused(tmp_path, base, "bad_config", match="topk")


def test_pieces_that_do_not_fill_a_module_are_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, vector_length=15)
    refused(tmp_path, base, "shape_mismatch")


def test_every_field_is_known() -> None:
    check_fields(vblora.VBLoRAConfig, VBLoRAConfig)
