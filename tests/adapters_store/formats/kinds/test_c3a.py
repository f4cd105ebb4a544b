"""C3A against PEFT."""

from pathlib import Path
from typing import Any

import pytest
from peft import C3AConfig

from adapters_store.formats.kinds import c3a
from tests.adapters_store.formats.kinds.support import (
    LINEAR,
    check,
    check_damage,
    check_fields,
    edit_config,
    options,
    refused,
    trained,
)


def config(architecture: str, **further: Any) -> C3AConfig:
    return C3AConfig(**options(architecture, **{"block_size": 16, **further}))


@pytest.mark.parametrize("architecture", LINEAR)
@pytest.mark.parametrize("size", [1, 4, 32])
def test_equals_peft(tmp_path: Path, architecture: str, size: int) -> None:
    found = check(architecture, config(architecture, block_size=size), tmp_path)
    assert (found.kind, found.forms) == ("c3a", ("dense",))


def test_sizes_by_pattern(tmp_path: Path) -> None:
    check("llama", config("llama", block_size_pattern={"v_proj": 8}), tmp_path)


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "c3a_kernel", alone=True)


@pytest.mark.parametrize("size", [0, 5, 32])
def test_a_size_that_is_not_the_files_is_refused(tmp_path: Path, size: int) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, block_size=size)
    refused(tmp_path, base, "shape_mismatch")


def test_every_field_is_known() -> None:
    check_fields(c3a.C3AConfig, C3AConfig)
