"""TinyLoRA against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TinyLoraConfig

from adapters_store.formats.kinds import tinylora
from adapters_store.forms import SharedBasis
from adapters_store.limits import Limits
from tests.adapters_store.formats.kinds.support import (
    TARGETS,
    check,
    check_damage,
    check_fields,
    edit_config,
    imported,
    options,
    refused,
    trained,
)


def config(architecture: str, **further: Any) -> TinyLoraConfig:
    return TinyLoraConfig(**options(architecture, **{"r": 3, "u": 5, **further}))


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(("tying", "saved"), [(0.0, True), (0.6, False), (1.0, True)])
def test_equals_peft(tmp_path: Path, architecture: str, tying: float, saved: bool) -> None:
    found = check(architecture, config(architecture, weight_tying=tying, save_projection=saved), tmp_path)
    assert (found.kind, found.forms, found.rank) == ("tinylora", ("shared_basis",), {"min": 3, "max": 3})


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_an_embedding_equals_peft(tmp_path: Path, architecture: str) -> None:
    wanted = TinyLoraConfig(**{**options("llama"), "target_modules": ["embed_tokens", "q_proj"], "r": 2, "u": 5})
    check(architecture, wanted, tmp_path)


def test_adapters_share_their_basis(tmp_path: Path) -> None:
    bases = []
    for seed in (0, 1):
        base, _ = trained("llama", config("llama"), tmp_path / str(seed), seed=seed)
        bases.append(imported(tmp_path / str(seed), base)[1])
    for name, forms in bases[0].modules.items():
        first, second = forms[0], bases[1].modules[name][0]
        assert isinstance(first, SharedBasis)
        assert isinstance(second, SharedBasis)
        assert torch.equal(first.u, second.u)
        assert torch.equal(first.v, second.v)
        assert not torch.equal(first.core, second.core)


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "tinylora_A", "tinylora_B", "tinylora_P", "tinylora_v.0")


@pytest.mark.parametrize("changes", [{"u": 0}, {"weight_tying": 1.5}])
def test_numbers_that_mean_nothing_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, **changes)
    refused(tmp_path, base, "bad_config", match="weight_tying")


def test_random_matrices_beyond_the_limit_are_not_drawn(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama", u=1000, save_projection=False), tmp_path)
    with pytest.raises(Exception, match="random matrices for 9 modules beyond the limit") as caught:
        imported(tmp_path, base, Limits(form_bytes=30_000))
    assert caught.value.code == "adapter_too_large"  # type: ignore[attr-defined]


def test_every_field_is_known() -> None:
    check_fields(tinylora.TinyLoraConfig, TinyLoraConfig)
