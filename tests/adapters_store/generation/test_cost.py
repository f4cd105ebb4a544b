"""What an adapter may cost to make is known before anything is built, and refused by name: of files and of orders."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adapters_store.errors import AdapterInvalid
from adapters_store.generation import generator_file, parameters
from adapters_store.generation.container import dump
from adapters_store.generation.cost import MAX_DECODE_BYTES, check_cost, decode_bytes, multiply_adds
from adapters_store.generation.icm import Cvae, IcmSettings
from adapters_store.generation.training import TrainSettings, train
from tests.adapters_store.generation.support import TINY, samples, trained
from tests.adapters_store.support import BASE

CONDITION = 4096
WIDE = IcmSettings(channels=(16,) * 16, group=4 << 20)
LARGEST = (1 << 31) - 1


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [(TINY, 100), (IcmSettings(latent=3, channels=(2, 5, 4, 7), group=4096), 10_000), (IcmSettings(), 1_929_928)],
)
def test_multiply_adds_are_those_of_the_decoder(settings: IcmSettings, numbers: int) -> None:
    with torch.device("meta"):
        model = Cvae(settings, numbers, 5).eval()
        with FlopCounterMode(display=False) as counter:
            for _ in range(model.pieces):
                z, piece = torch.zeros(1, settings.latent), torch.zeros(1, dtype=torch.long)
                model.decode(z, torch.zeros(1, 5), piece)
    assert multiply_adds(settings, numbers, 5) == counter.get_total_flops() // 2


def test_the_bytes_of_a_piece() -> None:
    """The last convolution's columns, its 8 channels and its result; else a stage that widens has more."""
    assert decode_bytes(IcmSettings(), 1_929_928) == 8 * (7 * 8 + 8 + 1) * 472 * 4096
    assert decode_bytes(IcmSettings(), 42_000_000) == 8 * 65 * 2_002_944  # 21 pieces, in whole 4096
    middle = IcmSettings(channels=(1, 32, 64))
    assert decode_bytes(middle, 64) == 8 * (64 * 8 + 7 * 32 * 8 + 32 * 16)  # 64 channels of 8 become 32 of 16


@pytest.mark.parametrize("numbers", [1, 1_929_928, 2 << 20, 42_000_000])
def test_the_released_design_passes(numbers: int) -> None:
    check_cost(IcmSettings(), numbers, CONDITION)


REFUSED = [
    (WIDE, 4_200_000, f"2128 MiB .* {MAX_DECODE_BYTES >> 20} MiB"),
    (IcmSettings(latent=1, channels=(1,), group=1), 12_288, "12288 pieces .* 256;"),
    (IcmSettings(channels=(1,), group=4095), 8190, "groups of 4095; the least is 4096"),
    (IcmSettings(group=4096), 257 * 4096, "257 pieces"),
    (IcmSettings(), 60_000_000, r"multiply-adds .* 6.00e\+11"),
    (IcmSettings(channels=tuple(16 << stage for stage in range(16))), 1, "multiply-adds"),
    (IcmSettings(group=1), LARGEST * LARGEST * 2, "pieces"),
    (IcmSettings(group=4 << 20), LARGEST * LARGEST * 2, "pieces"),
]


@pytest.mark.parametrize(("settings", "numbers", "why"), REFUSED)
def test_what_costs_too_much(settings: IcmSettings, numbers: int, why: str) -> None:
    with pytest.raises(AdapterInvalid, match=why) as caught:
        check_cost(settings, numbers, CONDITION)
    assert caught.value.code == "generator_too_large"
    given = {"latent": settings.latent, "channels": list(settings.channels), "group": settings.group}
    with pytest.raises(AdapterInvalid, match=why) as caught:  # an order, before its samples are read
        parameters.settings(given, BASE.fingerprint, numbers, CONDITION, 2)
    assert (caught.value.code, caught.value.param) == ("generator_too_large", "settings")


def test_the_least_group_and_the_most_calls() -> None:
    thin = IcmSettings(latent=1, channels=(1,), group=4096)
    check_cost(thin, 256 * 4096, 1)
    check_cost(replace(thin, group=1), 1, 1)  # all numbers in one


def test_training_never_makes_what_could_not_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters_store.generation.training.Cvae", None)
    with pytest.raises(AdapterInvalid) as caught:
        train(samples(), TrainSettings(BASE.fingerprint, replace(TINY, group=1)))
    assert caught.value.code == "generator_too_large"


HUGE = {"rank": LARGEST, "inputs": LARGEST, "outputs": LARGEST}


@pytest.mark.parametrize(
    ("settings", "module", "based", "code"),
    [
        (IcmSettings(latent=1, channels=(1,), group=1), {}, True, "generator_too_large"),
        (WIDE, {"rank": 210, "inputs": 10_000, "outputs": 10_000}, False, "generator_too_large"),
        (IcmSettings(latent=1, channels=(1,), group=1), HUGE, False, "generator_too_large"),
        (IcmSettings(latent=1, channels=(1,), group=1), HUGE, True, "base_mismatch"),
        (IcmSettings(latent=1, channels=(1,), group=1), {"rank": LARGEST}, True, "rank_limit"),
        (TINY, {"scale": 1e308}, True, "generator_invalid"),
    ],
)
def test_a_file_is_refused_before_its_model_is_built(
    settings: IcmSettings,
    module: dict[str, Any],
    based: bool,
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = trained().generator.layout.to_json()
    layout["modules"][0] |= module
    told = {"schema": 1, "base": BASE.fingerprint, "layout": layout, "settings": settings.to_json()}
    (tmp_path / "file").write_bytes(dump(told | {"condition": 4, "tasks": ["t"]}, {"model.last.bias": torch.zeros(1)}))
    monkeypatch.setattr(generator_file, "Cvae", None)
    with pytest.raises(AdapterInvalid) as caught:
        generator_file.load(tmp_path / "file", BASE if based else None)
    assert caught.value.code == code
