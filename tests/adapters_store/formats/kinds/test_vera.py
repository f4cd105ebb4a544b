"""VeRA and PVeRA against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PveraConfig, VeraConfig

from adapters_store.formats.kinds import vera
from adapters_store.limits import Limits
from tests.adapters_store.formats.kinds.support import (
    check,
    check_damage,
    check_fields,
    edit_config,
    edit_tensors,
    imported,
    refused,
    trained,
)

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "qwen2": ["k_proj", "up_proj"]}
CONFIGS: dict[str, type[PeftConfig]] = {"vera": VeraConfig, "pvera": PveraConfig}


def config(kind: str, architecture: str, **options: Any) -> PeftConfig:
    options = {"r": 5, "task_type": "CAUSAL_LM", "target_modules": TARGETS[architecture], **options}
    return CONFIGS[kind](**options)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("rank", "saved"), [(1, True), (7, True), (7, False)])
def test_equals_peft(tmp_path: Path, architecture: str, kind: str, rank: int, saved: bool) -> None:
    wanted = config(kind, architecture, r=rank, save_projection=saved, projection_prng_key=3)
    found = check(architecture, wanted, tmp_path)
    assert (found.kind, found.forms, found.rank) == (kind, ("low_rank",), {"min": rank, "max": rank})


@pytest.mark.parametrize("kind", CONFIGS)
def test_damage_is_refused(tmp_path: Path, kind: str) -> None:
    parts = (f"{kind}_lambda_b", f"{kind}_lambda_d", f"{kind}_A", f"{kind}_B")
    check_damage("llama", config(kind, "llama"), tmp_path, *parts)


@pytest.mark.parametrize("kind", CONFIGS)
def test_projections_that_the_config_does_not_save_are_refused(tmp_path: Path, kind: str) -> None:
    base, _ = trained("llama", config(kind, "llama"), tmp_path)
    edit_config(tmp_path, save_projection=False)
    refused(tmp_path, base, "bad_tensor_entry", match=f"{kind}_")


def test_the_seed_and_nothing_else_draws(tmp_path: Path) -> None:
    base, _ = trained("llama", config("vera", "llama", save_projection=False), tmp_path)
    before = torch.get_rng_state()
    first = imported(tmp_path, base)[1]
    assert torch.equal(torch.get_rng_state(), before)
    edit_config(tmp_path, projection_prng_key=1)
    second = imported(tmp_path, base)[1]
    name = next(iter(first.modules))
    assert not torch.equal(first.modules[name][0].a, second.modules[name][0].a)  # type: ignore[union-attr, arg-type]


def test_a_rank_beyond_the_limit_draws_nothing(tmp_path: Path) -> None:
    base, _ = trained("llama", config("vera", "llama", r=9, save_projection=False), tmp_path)
    with pytest.raises(Exception, match="rank 9; the limit is 8") as caught:
        imported(tmp_path, base, Limits(max_rank=8))
    assert caught.value.code == "rank_limit"  # type: ignore[attr-defined]


def test_sampling_while_serving_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("pvera", "llama", sample_at_inference=True), tmp_path)
    refused(tmp_path, base, "feature_unsupported", match="sample_at_inference")


def test_a_projection_given_twice_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("vera", "llama"), tmp_path)

    def twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["vera_A"] = tensors["base_model.vera_A"].clone()

    edit_tensors(tmp_path, twice)
    refused(tmp_path, base, "bad_tensor_entry", match="vera_A")


def test_every_field_is_known() -> None:
    check_fields(vera.VeraConfig, VeraConfig)
    check_fields(vera.PveraConfig, PveraConfig)
