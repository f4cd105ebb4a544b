"""DEFT and PaRa against PEFT."""

from pathlib import Path
from typing import Any

import pytest
from peft import DeftConfig

from adapters_store.formats.kinds import deft
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


def config(architecture: str, **further: Any) -> DeftConfig:
    return DeftConfig(**options(architecture, **{"r": 4, **further}))


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(
    "further",
    [{}, {"decomposition_method": "qr", "alpha": 6}, {"para": True}, {"para": True, "decomposition_method": "qr"}],
)
def test_equals_peft(tmp_path: Path, architecture: str, further: dict[str, Any]) -> None:
    found = check(architecture, config(architecture, **further), tmp_path)
    assert (found.kind, found.forms, found.rank) == ("deft", ("low_rank",), {"min": 4, "max": 4})


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "deft_P", "deft_R")


def test_what_para_does_not_have_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, para=True)
    refused(tmp_path, base, "bad_tensor_entry", match="deft_R")


def test_every_field_is_known() -> None:
    check_fields(deft.DeftConfig, DeftConfig)
