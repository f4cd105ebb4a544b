"""The autoencoder has the sizes of the released one, and a vector comes out of its pieces as it went in."""

import pytest
import torch
from torch import nn

from adapters_store.generation.icm import Cvae, IcmSettings, loss
from tests.adapters_store.generation.support import TINY

RELEASED_NUMBERS, RELEASED_CONDITION = 1_929_928, 768
RELEASED_PARAMETERS = 7_508_369


def test_sizes_of_the_released_code() -> None:
    with torch.device("meta"):
        model = Cvae(IcmSettings(), RELEASED_NUMBERS, RELEASED_CONDITION)
    assert (model.pieces, model.length) == (1, 472 * 4096)
    assert len(model.down) == len(model.up) == 12
    assert (model.linear.in_features, model.linear.out_features) == (8 * 472, 256)
    assert model.mean.in_features == model.log_variance.in_features == model.widen.in_features == 256 + 768
    assert sum(parameter.numel() for parameter in model.parameters()) == RELEASED_PARAMETERS
    assert [stage[0].out_channels for stage in model.down] == list(IcmSettings().channels)  # type: ignore[index]
    kinds = {type(module) for module in model.modules()}
    assert kinds >= {nn.LeakyReLU, nn.ELU, nn.BatchNorm1d, nn.Conv1d, nn.ConvTranspose1d}


@pytest.mark.parametrize("numbers", [1, 7, 8, 9, 100])
def test_shapes(numbers: int) -> None:
    torch.manual_seed(0)
    model = Cvae(TINY, numbers, 5).eval()
    assert model.length % 8 == 0
    assert 0 <= model.length - numbers < 8
    rows, condition, piece = torch.randn(3, model.length), torch.randn(3, 5), torch.zeros(3, dtype=torch.long)
    mean, log_variance = model.encode(rows, condition, piece)
    assert mean.shape == log_variance.shape == (3, 8)
    assert model.decode(mean, condition, piece).shape == (3, model.length)
    assert not torch.allclose(model.decode(mean, condition.flip(0), piece), model.decode(mean, condition, piece))


@pytest.mark.parametrize("numbers", [16, 17, 100, 101, 160])
def test_a_long_vector_is_cut_and_joined(numbers: int) -> None:
    torch.manual_seed(numbers)
    settings = IcmSettings(latent=4, channels=(4, 4), group=16)
    model = Cvae(settings, numbers, 3).eval()
    assert model.pieces == -(-numbers // 16)
    vector = torch.randn(numbers)
    rows = model.cut(vector)
    assert rows.shape == (model.pieces, model.length)
    assert model.length <= 16
    assert torch.equal(model.joined(rows), vector)
    if model.pieces > 1:
        z, condition = torch.zeros(2, 4), torch.zeros(2, 3)
        made = model.decode(z, condition, torch.tensor([0, 1]))
        assert not torch.allclose(made[0], made[1])


def test_parameters_do_not_grow_with_the_pieces() -> None:
    def count(numbers: int) -> int:
        with torch.device("meta"):
            model = Cvae(IcmSettings(), numbers, 4096)
        return sum(parameter.numel() for parameter in model.parameters() if parameter is not model.embedding)

    assert count(40 * (2 << 20)) == count(20 * (2 << 20))


def test_the_loss() -> None:
    given, made = torch.randn(4, 9), torch.randn(4, 9)
    mean, log_variance = torch.randn(4, 3), torch.randn(4, 3)
    error, divergence = loss(given, made, mean, log_variance)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    assert torch.allclose(divergence, expected, atol=1e-5)
    assert torch.allclose(error, ((given - made) ** 2).mean())


@pytest.mark.parametrize(
    "change",
    [
        {"latent": 0},
        {"latent": 1 << 20},
        {"latent": 2.0},
        {"channels": ()},
        {"channels": (1,) * 17},
        {"channels": (17,)},
        {"channels": (8, 0)},
        {"group": 0},
        {"group": 1 << 30},
        {"kl_weight": float("nan")},
        {"kl_weight": float("inf")},
        {"kl_weight": "1"},
    ],
)
def test_settings_out_of_bounds(change: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        IcmSettings(**change)  # type: ignore[arg-type]


def test_settings_there_and_back() -> None:
    assert IcmSettings.from_json(TINY.to_json()) == TINY
