"""FourierFT and WaveFT against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import FourierFTConfig, WaveFTConfig

from adapters_store.formats.kinds import spectrum
from tests.adapters_store.formats.kinds.support import (
    check,
    check_damage,
    check_fields,
    edit_config,
    imported,
    refused,
    trained,
)

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "qwen2": ["k_proj", "up_proj"]}


def fourier(architecture: str, **options: Any) -> FourierFTConfig:
    options = {"n_frequency": 50, "target_modules": TARGETS[architecture], **options}
    return FourierFTConfig(task_type="CAUSAL_LM", **options)


def wave(architecture: str, **options: Any) -> WaveFTConfig:
    options = {"n_frequency": 50, "target_modules": TARGETS[architecture], **options}
    return WaveFTConfig(task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("count", [1, 400])
def test_fourier_equals_peft(tmp_path: Path, architecture: str, count: int) -> None:
    found = check(architecture, fourier(architecture, n_frequency=count), tmp_path)
    assert (found.kind, found.forms) == ("fourierft", ("dense",))


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("count", [1, 400])
def test_wave_equals_peft(tmp_path: Path, architecture: str, count: int) -> None:
    found = check(architecture, wave(architecture, n_frequency=count), tmp_path)
    assert (found.kind, found.forms) == ("waveft", ("sparse",))


@pytest.mark.parametrize(("inner", "hidden"), [(95, 60), (96, 60)])
def test_wave_of_odd_sizes(tmp_path: Path, inner: int, hidden: int) -> None:
    sizes = {"intermediate_size": inner, "hidden_size": hidden}
    check("llama", wave("llama", n_frequency=900, target_modules=["down_proj", "up_proj"]), tmp_path, sizes=sizes)


@pytest.mark.parametrize("make", [fourier, wave])
def test_seeds_scales_and_patterns(tmp_path: Path, make: Any) -> None:
    options = {"random_loc_seed": 5, "scaling": 40.0, "n_frequency_pattern": {"v_proj": 31}}
    check("llama", make("llama", **options), tmp_path)
    check("llama", make("llama", random_loc_seed=6), tmp_path / "other")


@pytest.mark.parametrize("options", [{"use_idwt": False}, {"proportional_parameters": True}])
def test_other_waves(tmp_path: Path, options: dict[str, Any]) -> None:
    check("llama", wave("llama", **options), tmp_path)


def test_the_global_seed_is_left_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    base, _ = trained("llama", fourier("llama"), tmp_path)
    torch.random.set_rng_state(state)
    imported(tmp_path, base)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", fourier("llama"), tmp_path, "fourierft_spectrum", alone=True)
    check_damage("llama", wave("llama"), tmp_path, "waveft_spectrum", alone=True)


@pytest.mark.parametrize(
    ("change", "code", "match"),
    [
        ({"n_frequency": 10**12}, "bad_config", "coefficients"),
        ({"bias": "all"}, "feature_unsupported", "bias"),
        ({"random_loc_seed": None}, "bad_config", "random_loc_seed"),
        ({"random_loc_seed": 2**64}, "bad_config", "random_loc_seed"),
        ({"wavelet_family": "db2"}, "feature_unsupported", "wavelet_family"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, change: dict[str, Any], code: str, match: str) -> None:
    base, _ = trained("llama", wave("llama"), tmp_path)
    edit_config(tmp_path, **change)
    refused(tmp_path, base, code, match)


def test_every_field_is_known() -> None:
    check_fields(spectrum.FourierFtConfig, FourierFTConfig)
    check_fields(spectrum.WaveFtConfig, WaveFTConfig)
