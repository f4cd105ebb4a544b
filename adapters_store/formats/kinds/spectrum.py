"""FourierFT (arXiv 2405.03003) and WaveFT (arXiv 2505.12532): few coefficients of the delta's transform are trained."""

import torch
from pydantic import Field

from adapters_store.formats.kinds.folding import dense, refuse_bias, refuse_kinds
from adapters_store.formats.kinds.sparse_rows import compressed
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad, unsupported
from adapters_store.forms import Form

_FOURIER, _WAVE = "fourierft_spectrum", "waveft_spectrum"


class FourierFtConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2. How many coefficients a module has is chosen like a rank."""

    r: int = Field(1000, alias="n_frequency")
    rank_pattern: dict[str, int] | None = Field(None, alias="n_frequency_pattern")
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    bias: str = "none"
    init_weights: bool = False


class WaveFtConfig(FourierFtConfig):
    """adapter_config.json of PEFT 0.21.2."""

    r: int = Field(2592, alias="n_frequency")
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    proportional_parameters: bool = False
    init_weights: bool = True


def _check(config: FourierFtConfig) -> None:
    refuse_bias(config)
    if config.random_loc_seed is None or not -(2**63) <= config.random_loc_seed < 2**64:
        bad("has a `random_loc_seed` that is no seed", "random_loc_seed")


def _check_wave(config: WaveFtConfig) -> None:
    _check(config)
    if config.use_idwt and config.wavelet_family != "db1":
        unsupported(["a wavelet_family other than db1"])


def _shapes(target: Target, part: str) -> Shapes:
    refuse_kinds(target, "embedding")
    config = target.file.config
    by_size = isinstance(config, WaveFtConfig) and config.proportional_parameters
    count = target.entries[part].count if by_size else target.rank
    if count > target.inputs * target.outputs:
        target.refuse(f"has {count} coefficients, more than the weight has entries", "bad_config")
    return {part: (count,)}


def _places(target: Target, count: int) -> torch.Tensor:
    """int64 [count], `row * in + column` of each coefficient, drawn as PEFT draws them."""
    total, seed = target.inputs * target.outputs, target.file.config.random_loc_seed

    def draw() -> torch.Tensor:
        return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].clone()

    return target.file.once(f"{count} of {total}", draw)


def _fourier(target: Target) -> list[Form]:
    """`scaling * Re(ifft2(F))`, F zero but for the coefficients."""
    numbers = target.tensor(_FOURIER)
    spectrum = torch.zeros(target.outputs * target.inputs)
    spectrum[_places(target, len(numbers))] = numbers
    delta = torch.fft.ifft2(spectrum.view(target.outputs, target.inputs)).real
    return dense(delta * target.file.config.scaling)


def _wave(target: Target) -> list[Form]:
    """`scaling * idwt2(F)`, one level of Haar's wavelet: a coefficient gives four neighbours, so the delta is sparse.

    Quarters of F: top left the means; right half differences of rows; lower half differences of columns (`waverec2d`).
    A size that is odd is filled up to an even one.
    """
    numbers, config = target.tensor(_WAVE), target.file.config
    place = _places(target, len(numbers))
    values = numbers * config.scaling
    if not config.use_idwt:
        return [compressed(place, values, target.outputs, target.inputs)]
    row, column = place // target.inputs, place % target.inputs
    half_rows, half_columns = (target.outputs + 1) // 2, (target.inputs + 1) // 2
    places, parts = [], []
    for down in (0, 1):
        for right in (0, 1):
            at_row, at_column = row % half_rows * 2 + down, column % half_columns * 2 + right
            minus = ((column >= half_columns) & bool(down)) ^ ((row >= half_rows) & bool(right))
            inside = (at_row < target.outputs) & (at_column < target.inputs)
            places.append((at_row * target.inputs + at_column)[inside])
            parts.append(torch.where(minus, -values, values)[inside] / 2)
    return [compressed(torch.cat(places), torch.cat(parts), target.outputs, target.inputs)]


METHODS = (
    Method(
        kind="fourierft",
        peft_type="FOURIERFT",
        config=FourierFtConfig,
        served="native",
        note="A dense delta, computed from its spectrum when it is imported; the places are drawn again from the seed.",
        source="arXiv 2405.03003",
        parts=frozenset({_FOURIER}),
        shapes=lambda target: _shapes(target, _FOURIER),
        forms=_fourier,
        check=_check,
    ),
    Method(
        kind="waveft",
        peft_type="WAVEFT",
        config=WaveFtConfig,
        served="native",
        note="A sparse delta of four entries a coefficient (Haar's wavelet only); places drawn again from the seed.",
        source="arXiv 2505.12532",
        parts=frozenset({_WAVE}),
        shapes=lambda target: _shapes(target, _WAVE),
        forms=_wave,
        check=_check_wave,
    ),
)
