"""MiSS against PEFT."""

from pathlib import Path
from typing import Any

import pytest
from peft import MissConfig

from adapters_store.formats.kinds import miss
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


def config(architecture: str, **further: Any) -> MissConfig:
    return MissConfig(**options(architecture, **further))


@pytest.mark.parametrize("architecture", LINEAR)
@pytest.mark.parametrize(
    ("further", "form"),
    [
        ({"r": 8}, "low_rank"),
        ({"r": 7}, "low_rank"),  # divides no number of inputs
        ({"r": 8, "init_weights": "mini", "mini_r": 16}, "low_rank"),
        ({"r": 8, "init_weights": "bat"}, "dense"),
    ],
)
def test_equals_peft(tmp_path: Path, architecture: str, further: dict[str, Any], form: str) -> None:
    found = check(architecture, config(architecture, **further), tmp_path)
    assert (found.kind, found.forms) == ("miss", (form,))
    assert found.rank["max"] == (further["r"] if form == "low_rank" else 0)


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama", r=4), tmp_path, "miss_block", alone=True)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"init_weights": "bat", "r": 5}, "shape_mismatch"),
        ({"init_weights": "mini", "mini_r": 7}, "shape_mismatch"),
        ({"init_weights": "mini", "mini_r": 0}, "bad_config"),
        ({"r": 65}, "shape_mismatch"),
        ({"bias": "all"}, "feature_unsupported"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    base, _ = trained("llama", config("llama", r=4), tmp_path)
    edit_config(tmp_path, **changes)
    refused(tmp_path, base, code)


def test_every_field_is_known() -> None:
    check_fields(miss.MissConfig, MissConfig)
