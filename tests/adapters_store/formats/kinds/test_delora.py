"""DeLoRA against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import DeloraConfig

from adapters_store.formats.kinds import delora
from tests.adapters_store.formats.kinds.support import LINEAR, check, check_damage, check_fields, options, randomise


def config(architecture: str, **further: Any) -> DeloraConfig:
    return DeloraConfig(**options(architecture, **{"r": 5, **further}))


@pytest.mark.parametrize("architecture", LINEAR)
@pytest.mark.parametrize("rank", [1, 5])
def test_equals_peft(tmp_path: Path, architecture: str, rank: int) -> None:
    found = check(architecture, config(architecture, r=rank), tmp_path)
    assert (found.kind, found.forms, found.rank) == ("delora", ("low_rank",), {"min": rank, "max": rank})


def test_ranks_by_pattern(tmp_path: Path) -> None:
    wanted = config("llama", rank_pattern={"q_proj": 3}, lambda_pattern={"v_proj": 2})
    assert check("llama", wanted, tmp_path).rank == {"min": 3, "max": 5}


def test_a_rank_of_zeros_stays_finite(tmp_path: Path) -> None:
    def vanish(name: str, parameter: torch.Tensor) -> None:
        randomise(name, parameter)
        if "delora_A" in name:
            parameter[0] = 0

    check("llama", config("llama"), tmp_path, change=vanish)


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "delora_A", "delora_B", "delora_lambda", "delora_w_norm")


def test_every_field_is_known() -> None:
    check_fields(delora.DeloraConfig, DeloraConfig)
