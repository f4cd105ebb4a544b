"""BEFT against PEFT."""

from pathlib import Path

import pytest
from peft import BeftConfig

from adapters_store.formats.kinds import beft
from tests.adapters_store.formats.kinds.support import check, check_damage, check_fields

TARGETS = {"llama": ["q_proj", "v_proj"], "opt": ["fc1", "v_proj"], "qwen2": ["v_proj", "up_proj"]}


@pytest.mark.parametrize("architecture", TARGETS)
def test_equals_peft(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, BeftConfig(task_type="CAUSAL_LM", target_modules=TARGETS[architecture]), tmp_path)
    assert (found.kind, found.forms) == ("beft", ("output_scale",))


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage(
        "llama", BeftConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]), tmp_path, "beft_bias", alone=True
    )


def test_every_field_is_known() -> None:
    check_fields(beft.BeftConfig, BeftConfig)
