"""GraLoRA against PEFT."""

from pathlib import Path
from typing import Any

import pytest
from peft import GraloraConfig

from adapters_store.formats.kinds import gralora
from tests.adapters_store.formats.kinds.support import (
    TARGETS,
    check,
    check_damage,
    check_fields,
    edit_config,
    options,
    refused,
    trained,
)


def config(architecture: str, **further: Any) -> GraloraConfig:
    return GraloraConfig(**options(architecture, **{"r": 4, **further}))


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(
    ("further", "rank"),
    [({"gralora_k": 1}, 4), ({"gralora_k": 2}, 8), ({"gralora_k": 4, "hybrid_r": 3, "alpha": 7}, 19)],
)
def test_equals_peft(tmp_path: Path, architecture: str, further: dict[str, Any], rank: int) -> None:
    found = check(architecture, config(architecture, **further), tmp_path)
    assert (found.kind, found.forms, found.rank) == ("gralora", ("low_rank",), {"min": rank, "max": rank})


def test_damage_is_refused(tmp_path: Path) -> None:
    parts = ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight")
    check_damage("llama", config("llama", hybrid_r=2), tmp_path, *parts)


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"gralora_k": 3}, "bad_config"), ({"gralora_k": 0}, "bad_config"), ({"r": 15, "gralora_k": 5}, "shape_mismatch")],
)
def test_what_does_not_divide_is_refused(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, **changes)
    refused(tmp_path, base, code)


def test_every_field_is_known() -> None:
    check_fields(gralora.GraloraConfig, GraloraConfig)
