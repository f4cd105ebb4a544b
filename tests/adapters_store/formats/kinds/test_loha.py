"""LoHa against PEFT."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoHaConfig

from adapters_store.formats.kinds import loha
from adapters_store.limits import Limits
from tests.adapters_store.formats.kinds.support import (
    LINEAR,
    check,
    check_damage,
    check_fields,
    edit_config,
    imported,
    options,
    refused,
    trained,
)


def config(architecture: str, **further: Any) -> LoHaConfig:
    return LoHaConfig(**options(architecture, **further))


@pytest.mark.parametrize("architecture", LINEAR)
@pytest.mark.parametrize(("rank", "form"), [(1, "low_rank"), (4, "low_rank"), (9, "dense")])
def test_equals_peft(tmp_path: Path, architecture: str, rank: int, form: str) -> None:
    found = check(architecture, config(architecture, r=rank, alpha=5), tmp_path)
    assert (found.kind, found.forms) == ("loha", (form,))
    assert found.rank["max"] == (rank * rank if form == "low_rank" else 0)


def test_ranks_and_alphas_by_pattern(tmp_path: Path) -> None:
    wanted = config("llama", r=2, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 7})
    assert check("llama", wanted, tmp_path).rank == {"min": 4, "max": 9}


def test_a_rank_beyond_the_limit_becomes_dense(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama", r=3), tmp_path)
    assert imported(tmp_path, base, Limits(max_rank=8))[0].forms == ("dense",)


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama", r=2), tmp_path, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def test_a_target_that_peft_does_not_adapt_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama", r=2), tmp_path)
    edit_config(tmp_path, target_modules=["q_proj", "v_proj"])
    refused(tmp_path, base, "bad_tensor_entry", match="down_proj")


def test_every_field_is_known() -> None:
    check_fields(loha.LoHaConfig, LoHaConfig)
