"""4-bit factors: the layout, how near they stay, and what they take."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.compression import int8
from adapters_store.compression.int4 import pack, quantized, unpack
from adapters_store.compression.singular import norm, relative
from adapters_store.forms import LowRank
from tests.adapters_store.compression.support import delta, deltas, dense

# The linears of a layer of the default model (inputs, outputs); it has 30 such layers.
LAYER = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]


def test_the_layout() -> None:
    packed = pack(torch.tensor([[7.0, -7.0, 1.0], [0.0, 0.5, 0.0]]) / 7, group=2)
    assert packed.numbers.tolist() == [[15 | 1 << 4, 15], [8 | 15 << 4, 8]]
    assert packed.scales.shape == (2, 2)
    assert packed.scales[1].tolist() == [pytest.approx(0.5 / 49, rel=1e-3), 0.0]
    assert packed.bytes == 4 + 8


@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**31))
def test_numbers_on_the_grid_come_back(rows: int, columns: int, group: int, seed: int) -> None:
    """Whatever the shape: also where groups or pairs do not fill the row."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-7, 8, (rows, columns), generator=generator).float()
    for first in range(0, columns, group):
        numbers[:, first] = 7.0  # the range of each group ends at its largest
    packed = pack(numbers / 8, group)  # a scale of 1 / 8 is exact in float16
    assert packed.numbers.shape == (rows, -(-columns // 2))
    assert packed.scales.shape == (rows, -(-columns // group))
    assert torch.equal(unpack(packed), numbers / 8)


@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**31))
def test_no_group_is_worse_than_plain_rounding(columns: int, group: int, seed: int) -> None:
    values = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed)).double()
    values = values / values.abs().amax()
    lost = unpack(pack(values, group)).double() - values
    for first in range(0, columns, group):
        part = values[:, first : first + group]
        scale = (part.abs().amax(dim=1, keepdim=True) / 7).half().double().clamp(min=1e-30)
        plain = (part / scale).round().clamp(-7, 7) * scale - part
        own = lost[:, first : first + group]
        assert bool(((own**2).sum(dim=1) <= (plain**2).sum(dim=1) + 1e-9).all())


@given(deltas())
def test_the_error_is_the_dense_one(form: LowRank) -> None:
    found, error = quantized(form, group=16)
    size = float(dense(form).norm())
    assert error == pytest.approx(float((dense(found.form()) - dense(form)).norm()), rel=1e-6, abs=1e-9 * (1 + size))
    assert bool(found.d.isfinite().all())
    if size == 0:
        assert error == 0


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_random_factors_lose_about_a_seventh(rank: int) -> None:
    form = delta(rank, 576, 192, seed=rank)
    errors = [relative(quantized(form, group)[1], norm(form)) for group in (16, 64, 576)]
    assert errors == sorted(errors), "smaller groups are nearer"
    assert 0.05 < errors[0] < errors[1] < 0.2
    assert relative(int8.quantized(form)[1], norm(form)) < errors[0] / 5


def test_a_bias_stays() -> None:
    form, bias = delta(2, 5, 4), torch.arange(4.0)
    found, _ = quantized(LowRank(form.a, form.b, form.d, bias))
    assert found.form().bias is bias
    assert found.bytes == found.a.bytes + found.b.bytes + 4 * (2 + 4)


def test_four_hundred_adapters_of_the_default_model_fit_a_gibibyte() -> None:
    sizes = [quantized(delta(16, *shape, seed=1))[0].bytes for shape in LAYER]
    assert 400 * 30 * sum(sizes) < 2**30
