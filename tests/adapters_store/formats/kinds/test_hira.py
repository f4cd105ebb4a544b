"""HiRA against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig

from adapters_store.formats.kinds import hira
from tests.adapters_store.formats.kinds.support import (
    IDS,
    TARGETS,
    check,
    check_damage,
    check_fields,
    imported,
    options,
    refused,
    trained,
)
from tests.support import dense_forms


def config(architecture: str, **further: Any) -> HiraConfig:
    return HiraConfig(**options(architecture, **{"r": 4, **further}))


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("rank", [1, 4])
def test_equals_peft(tmp_path: Path, architecture: str, rank: int) -> None:
    found = check(architecture, config(architecture, r=rank), tmp_path)
    assert (found.kind, found.forms) == ("hira", ("dense",))


def test_ranks_by_pattern(tmp_path: Path) -> None:
    """PEFT makes the first adapter of a model without looking at the pattern, and a second one with it."""
    wanted = config("llama", rank_pattern={"q_proj": 2})
    check("llama", wanted, tmp_path)
    base, adapted = trained("llama", config("llama"), tmp_path)
    adapted.add_adapter("other", wanted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "other" in name:
                parameter.normal_(0.0, 0.3)
    adapted.set_adapter("other")
    adapted.save_pretrained(tmp_path, selected_adapters=["other"])
    weights = imported(tmp_path / "other", base)[1]
    expected = adapted.eval()(IDS).logits
    torch.testing.assert_close(dense_forms.logits(base, weights, IDS), expected, rtol=1e-4, atol=1e-3)


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "hira_A", "hira_B")


def test_an_embedding_is_refused(tmp_path: Path) -> None:
    wanted = HiraConfig(**{**options("llama"), "target_modules": ["embed_tokens"], "r": 2})
    base, _ = trained("llama", wanted, tmp_path)
    refused(tmp_path, base, "feature_unsupported", match="embedding")


def test_every_field_is_known() -> None:
    check_fields(hira.HiraConfig, HiraConfig)
