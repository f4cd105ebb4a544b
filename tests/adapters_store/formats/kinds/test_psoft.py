"""PSOFT against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PsoftConfig

from adapters_store.formats.kinds import psoft
from adapters_store.forms import SharedBasis
from tests.adapters_store.formats.kinds.support import (
    LINEAR,
    check,
    check_damage,
    check_fields,
    edit_config,
    imported,
    options,
    refused,
    trained,
)


def config(architecture: str, **further: Any) -> PsoftConfig:
    return PsoftConfig(**options(architecture, **{"r": 6, "psoft_alpha": 4, **further}))


@pytest.mark.parametrize("architecture", LINEAR)
@pytest.mark.parametrize(
    "further",
    [
        {},
        {"ab_svd_init": "pissa_init", "psoft_mag_a": False},
        {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 3, "random_seed": 7},
        {"psoft_orth": False, "psoft_mag_b": False},
    ],
)
def test_equals_peft(tmp_path: Path, architecture: str, further: dict[str, Any]) -> None:
    found = check(architecture, config(architecture, **further), tmp_path)
    assert (found.kind, found.forms, found.rank) == ("psoft", ("shared_basis",), {"min": 6, "max": 6})


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("eps", [None, 0.4])
def test_the_series_equals_peft(tmp_path: Path, terms: int, eps: float | None) -> None:
    wanted = config("llama", use_cayley_neumann=True, num_cayley_neumann_terms=terms, cayley_neumann_eps=eps)
    check("llama", wanted, tmp_path)


def test_adapters_share_their_basis_whatever_their_alpha(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path / "a")
    trained("llama", config("llama", psoft_alpha=9, ab_svd_init="pissa_init"), tmp_path / "b")
    first, second = (imported(tmp_path / name, base)[1] for name in "ab")
    for name, forms in first.modules.items():
        ours, theirs = forms[0], second.modules[name][0]
        assert isinstance(ours, SharedBasis)
        assert isinstance(theirs, SharedBasis)
        assert torch.equal(ours.u, theirs.u)
        assert torch.equal(ours.v, theirs.v)


def test_the_random_start_leaves_the_generator_alone(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama", psoft_svd="lowrank"), tmp_path)
    before = torch.get_rng_state()
    imported(tmp_path, base)
    assert torch.equal(torch.get_rng_state(), before)


def test_damage_is_refused(tmp_path: Path) -> None:
    parts = ("psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b")
    check_damage("llama", config("llama"), tmp_path, *parts)


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"num_cayley_neumann_terms": 10**9}, "bad_config"), ({"r": 33}, "shape_mismatch")],
)
def test_what_would_not_end_or_fit_is_refused(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, **changes)
    refused(tmp_path, base, code)


def test_every_field_is_known() -> None:
    check_fields(psoft.PsoftConfig, PsoftConfig)
