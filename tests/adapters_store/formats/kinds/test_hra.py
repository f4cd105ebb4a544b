"""HRA against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HRAConfig

from adapters_store.formats.kinds import hra
from tests.adapters_store.formats.kinds.support import (
    LINEAR,
    check,
    check_damage,
    check_fields,
    edit_tensors,
    options,
    refused,
    trained,
)


def config(architecture: str, **further: Any) -> HRAConfig:
    return HRAConfig(**options(architecture, **{"r": 4, **further}))


@pytest.mark.parametrize("architecture", LINEAR)
@pytest.mark.parametrize(("rank", "orthogonal"), [(1, False), (7, False), (4, True)])
def test_equals_peft(tmp_path: Path, architecture: str, rank: int, orthogonal: bool) -> None:
    found = check(architecture, config(architecture, r=rank, apply_GS=orthogonal), tmp_path)
    assert (found.kind, found.forms, found.rank) == ("hra", ("low_rank",), {"min": rank, "max": rank})


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "hra_u", alone=True)


def test_a_direction_of_zeros_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)

    def vanish(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[:, 0] = 0

    edit_tensors(tmp_path, vanish)
    refused(tmp_path, base, "nonfinite_weights")


def test_every_field_is_known() -> None:
    check_fields(hra.HRAConfig, HRAConfig)
