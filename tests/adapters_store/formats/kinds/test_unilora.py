"""Uni-LoRA against PEFT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import UniLoraConfig

from adapters_store.formats.kinds import unilora
from adapters_store.limits import Limits
from tests.adapters_store.formats.kinds.support import (
    TARGETS,
    check,
    check_damage,
    check_fields,
    edit_config,
    edit_tensors,
    imported,
    options,
    refused,
    trained,
)


def config(architecture: str, **further: Any) -> UniLoraConfig:
    return UniLoraConfig(**options(architecture, **{"r": 3, **further}))


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(("length", "saved"), [(50, False), (256, True)])
def test_equals_peft(tmp_path: Path, architecture: str, length: int, saved: bool) -> None:
    wanted = config(architecture, theta_d_length=length, save_indices=saved, proj_seed=5)
    found = check(architecture, wanted, tmp_path)
    assert (found.kind, found.forms, found.rank) == ("unilora", ("low_rank",), {"min": 3, "max": 3})
    assert found.warnings == ()


def test_a_vector_longer_than_the_factors(tmp_path: Path) -> None:
    check("llama", config("llama", r=1, theta_d_length=2000), tmp_path)


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "unilora_theta_d")
    check_damage("llama", config("llama", save_indices=True), tmp_path, "unilora_scales_A", "unilora_scales_B")


def test_a_place_beyond_the_vector_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama", save_indices=True), tmp_path)

    def beyond(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("unilora_indices_B"))
        tensors[name][0, 0] = -1

    edit_tensors(tmp_path, beyond)
    refused(tmp_path, base, "bad_index", match="outside 0 to 255")


def test_the_seed_and_nothing_else_draws(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    first = imported(tmp_path, base)[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpys).all()  # type: ignore[index]
    edit_config(tmp_path, proj_seed=43)
    second = imported(tmp_path, base)[1]
    name = next(iter(first.modules))
    assert not torch.equal(first.modules[name][0].a, second.modules[name][0].a)  # type: ignore[union-attr, arg-type]


def test_factors_beyond_the_limit_are_not_drawn(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    with pytest.raises(Exception, match="numbers; the limit is 3125") as caught:
        imported(tmp_path, base, Limits(form_bytes=100_000))
    assert caught.value.code == "adapter_too_large"  # type: ignore[attr-defined]


def test_every_field_is_known() -> None:
    check_fields(unilora.UniLoraConfig, UniLoraConfig)
