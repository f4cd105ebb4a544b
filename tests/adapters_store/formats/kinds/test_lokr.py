"""LoKr against PEFT."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoKrConfig
from peft.tuners.lokr.layer import factorization

from adapters_store.formats.kinds import lokr
from tests.adapters_store.formats.kinds.support import LINEAR, check, check_damage, check_fields, options


def config(architecture: str, **further: Any) -> LoKrConfig:
    return LoKrConfig(**options(architecture, **further))


@pytest.mark.parametrize("architecture", LINEAR)
@pytest.mark.parametrize(
    ("further", "rank"),
    [
        ({"r": 2, "decompose_both": True, "decompose_factor": 4, "alpha": 3}, 8),  # first whole, second of two factors
        ({"r": 2, "decompose_both": True}, 4),  # both of two factors
        ({"r": 2, "decompose_factor": 8}, 16),
    ],
)
def test_equals_peft(tmp_path: Path, architecture: str, further: dict[str, Any], rank: int) -> None:
    found = check(architecture, config(architecture, **further), tmp_path)
    assert (found.kind, found.forms, found.rank["max"]) == ("lokr", ("low_rank",), rank)


def test_two_whole_matrices_are_dense(tmp_path: Path) -> None:
    assert "dense" in check("llama", config("llama", r=16), tmp_path).forms


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama", r=2), tmp_path, "lokr_w1", "lokr_w2_a", "lokr_w2_b")


@pytest.mark.parametrize("factor", [-1, 0, 1, 3, 4, 8, 200])
def test_sides_are_cut_as_peft_cuts_them(factor: int) -> None:
    for side in (1, 2, 7, 32, 64, 96, 127, 128, 320, 4096):
        assert lokr.factorization(side, factor) == factorization(side, factor)


def test_every_field_is_known() -> None:
    check_fields(lokr.LoKrConfig, LoKrConfig)
