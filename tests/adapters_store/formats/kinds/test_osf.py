"""OSF against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OSFConfig

from adapters_store.formats.kinds import osf
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


def config(architecture: str, **further: Any) -> OSFConfig:
    return OSFConfig(**options(architecture, **{"effective_rank": 0.9, **further}))


@pytest.mark.parametrize("architecture", LINEAR)
@pytest.mark.parametrize(("kept", "form"), [(None, "dense"), (20, "dense"), (0.9, "low_rank")])
def test_equals_peft(tmp_path: Path, architecture: str, kept: float | None, form: str) -> None:
    found = check(architecture, config(architecture, effective_rank=kept), tmp_path)
    assert (found.kind, found.forms) == ("osf", (form,))


def test_ranks_by_pattern(tmp_path: Path) -> None:
    found = check("llama", config("llama", rank_pattern={"q_proj": 61, "v_proj": 0.95}), tmp_path)
    assert found.rank == {"min": 4, "max": 14}


def test_damage_is_refused(tmp_path: Path) -> None:
    parts = (f"osf_svd_params.{part}" for part in ("U_low", "S_low", "V_low"))
    check_damage("llama", config("llama"), tmp_path, *parts)


def test_more_than_all_singular_values_are_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)

    def everything(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("q_proj.osf_svd_params.S_low"))
        tensors[name] = torch.ones(64)

    edit_tensors(tmp_path, everything)
    refused(tmp_path, base, "shape_mismatch", match="at least one must be kept")


def test_every_field_is_known() -> None:
    check_fields(osf.OSFConfig, OSFConfig)
