"""PEANuT against PEFT."""

from pathlib import Path
from typing import Any

import pytest
from peft import PeanutConfig

from adapters_store.formats.kinds import peanut
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


def config(architecture: str, **further: Any) -> PeanutConfig:
    return PeanutConfig(**options(architecture, **{"r": 5, **further}))


@pytest.mark.parametrize("architecture", LINEAR)
@pytest.mark.parametrize(("depth", "act", "scaling"), [(0, "relu", 1.0), (2, "silu", 0.5)])
def test_equals_peft(tmp_path: Path, architecture: str, depth: int, act: str, scaling: float) -> None:
    found = check(architecture, config(architecture, depth=depth, act_fn=act, scaling=scaling), tmp_path)
    assert (found.kind, found.forms, found.rank) == ("peanut", ("low_rank",), {"min": 5, "max": 5})


@pytest.mark.parametrize("act", sorted(peanut.ACTIVATIONS))
def test_every_activation_equals_peft(tmp_path: Path, act: str) -> None:
    check("llama", config("llama", act_fn=act), tmp_path)


def test_damage_is_refused(tmp_path: Path) -> None:
    parts = ("peanut_A.weight", "peanut_B.weight", "peanut_encoders.0.weight", "peanut_decoders.0.weight")
    check_damage("llama", config("llama", depth=1), tmp_path, *parts)


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"depth": 65}, "bad_config"), ({"depth": -1}, "bad_config"), ({"act_fn": "prelu"}, "feature_unsupported")],
)
def test_networks_that_are_not_served(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, **changes)
    refused(tmp_path, base, code)


def test_every_field_is_known() -> None:
    check_fields(peanut.PeanutConfig, PeanutConfig)
