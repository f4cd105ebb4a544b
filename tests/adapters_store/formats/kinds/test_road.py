"""RoAd against PEFT."""

from pathlib import Path
from typing import Any

import pytest
from peft import RoadConfig

from adapters_store.formats.kinds import road
from tests.adapters_store.formats.kinds.support import (
    check,
    check_damage,
    check_fields,
    edit_config,
    refused,
    trained,
)

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "opt": ["fc1", "v_proj"], "qwen2": ["k_proj", "up_proj"]}


def config(architecture: str, **options: Any) -> RoadConfig:
    return RoadConfig(task_type="CAUSAL_LM", **{"target_modules": TARGETS[architecture], "group_size": 8, **options})


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("group", [2, 32])
def test_equals_peft(tmp_path: Path, architecture: str, variant: str, group: int) -> None:
    found = check(architecture, config(architecture, variant=variant, group_size=group), tmp_path)
    assert (found.kind, found.forms) == ("road", ("output_scale",))


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "road_theta", "road_alpha")


@pytest.mark.parametrize("group", [0, 3, 48])
def test_a_group_that_does_not_fit_is_refused(tmp_path: Path, group: int) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, group_size=group)
    refused(tmp_path, base, "bad_config", "group_size")


def test_every_field_is_known() -> None:
    check_fields(road.RoadConfig, RoadConfig)
