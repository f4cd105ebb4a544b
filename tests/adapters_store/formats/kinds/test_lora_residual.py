"""KaSA, PiSSA and OLoRA against PEFT: their base changes while they train, ours does not."""

from pathlib import Path
from typing import Any

import pytest
from peft import KasaConfig, LoraConfig

from tests.adapters_store.formats.kinds.support import (
    LINEAR,
    TARGETS,
    check,
    check_damage,
    edit_config,
    options,
    refused,
    trained,
)

STARTS: dict[str, dict[str, Any]] = {
    "kasa": {"kasa_config": KasaConfig()},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


def config(kind: str, architecture: str, **further: Any) -> LoraConfig:
    return LoraConfig(**options(architecture, **{"r": 4, "lora_alpha": 3, **STARTS[kind], **further}))


@pytest.mark.parametrize("architecture", LINEAR)
@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("further", [{"r": 1}, {"use_rslora": True}])
def test_equals_peft(tmp_path: Path, architecture: str, kind: str, further: dict[str, Any]) -> None:
    found = check(architecture, config(kind, architecture, **further), tmp_path)
    rank = 2 * further.get("r", 4)
    assert (found.kind, found.forms, found.rank) == (kind, ("low_rank",), {"min": rank, "max": rank})


def test_pissa_on_conv1d(tmp_path: Path) -> None:
    assert check("gpt2", config("pissa", "gpt2"), tmp_path).kind == "pissa"


def test_half_the_rank_is_dense_with_its_bias(tmp_path: Path) -> None:
    wanted = config("kasa", "llama", r=20, lora_bias=True, target_modules=["q_proj"])
    assert check("llama", wanted, tmp_path).forms == ("dense", "output_scale")


def test_ranks_and_alphas_by_pattern(tmp_path: Path) -> None:
    wanted = config("pissa", "llama", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 9})
    assert check("llama", wanted, tmp_path).rank == {"min": 4, "max": 8}


@pytest.mark.parametrize("kind", STARTS)
def test_damage_is_refused(tmp_path: Path, kind: str) -> None:
    parts = ("lora_A.weight", "lora_B.weight", *(("lora_diag",) if kind == "kasa" else ()))
    check_damage("llama", config(kind, "llama"), tmp_path, *parts)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_starts_that_no_file_tells_are_refused(tmp_path: Path, architecture: str, start: str) -> None:
    base, _ = trained(architecture, LoraConfig(**options(architecture)), tmp_path)
    edit_config(tmp_path, init_lora_weights=start)
    refused(tmp_path, base, "feature_unsupported", match="path_initial_model_for_weight_conversion")


@pytest.mark.parametrize("kind", STARTS)
def test_two_variants_at_once_are_refused(tmp_path: Path, kind: str) -> None:
    base, _ = trained("llama", config(kind, "llama"), tmp_path)
    edit_config(tmp_path, use_dora=True)
    refused(tmp_path, base, "feature_unsupported")
