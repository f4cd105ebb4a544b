"""RandLoRA against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import RandLoraConfig

from adapters_store.formats.kinds import randlora
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


def config(architecture: str, **further: Any) -> RandLoraConfig:
    return RandLoraConfig(**options(architecture, **{"r": 5, "projection_prng_key": 3, **further}))


def gently(name: str, parameter: torch.Tensor) -> None:
    """The method's scale is large; far from the base, float32 itself loses digits."""
    parameter.normal_(0.0, 0.02)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(
    "further",
    [
        {},
        {"save_projection": False, "r": 8},
        {"save_projection": False, "sparse": True},
        {"save_projection": False, "very_sparse": True},
    ],
)
def test_equals_peft(tmp_path: Path, architecture: str, further: dict[str, Any]) -> None:
    found = check(architecture, config(architecture, **further), tmp_path, change=gently)
    assert (found.kind, found.forms) == ("randlora", ("dense",))


def test_damage_is_refused(tmp_path: Path) -> None:
    parts = ("randlora_lambda", "randlora_gamma", "base_model.randlora_A", "base_model.randlora_B")
    check_damage("llama", config("llama"), tmp_path, *parts)


def test_copies_that_older_files_lack_are_not_needed(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path, change=gently)
    whole = imported(tmp_path, base)[1]

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers" in name and name.endswith(("randlora_A", "randlora_B"))]:
            del tensors[name]

    edit_tensors(tmp_path, drop)
    for name, forms in imported(tmp_path, base)[1].modules.items():
        assert torch.equal(forms[0].weight, whole.modules[name][0].weight)  # type: ignore[union-attr, arg-type]


def test_a_copy_that_differs_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)

    def differ(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "layers" in name and name.endswith("randlora_B"))
        tensors[name] = tensors[name] + 1

    edit_tensors(tmp_path, differ)
    refused(tmp_path, base, "bad_tensor_entry", match="differ")


def test_the_seed_and_nothing_else_draws(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama", save_projection=False), tmp_path)
    before = torch.get_rng_state()
    first = imported(tmp_path, base)[1]
    assert torch.equal(torch.get_rng_state(), before)
    edit_config(tmp_path, projection_prng_key=4)
    second = imported(tmp_path, base)[1]
    name = next(iter(first.modules))
    assert not torch.equal(first.modules[name][0].weight, second.modules[name][0].weight)  # type: ignore[union-attr, arg-type]


def test_every_field_is_known() -> None:
    check_fields(randlora.RandLoraConfig, RandLoraConfig)
