"""4-bit factors: the layout, how near they stay, and what they take."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.compression import int8
from adapters_store.compression.int4 import pack, quantized
from adapters_store.compression.singular import norm, relative
from adapters_store.forms import LowRank
from kernels import reference
from kernels.segments import INT4, INT4_GROUP, RECORD_FIELDS, Field, Segments
from tests.adapters_store.compression.support import delta, deltas, dense

# The linears of a layer of the default model (inputs, outputs); it has 30 such layers.
LAYER = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
PAGE = 368_640  # bytes of a page of the pool over a 16-bit KV cache


def test_the_layout() -> None:
    values = torch.zeros(2, 66)
    values[0, 0], values[0, 1], values[0, 16], values[0, 65] = 7.0, -7.0, 1.0, 0.8
    packed, row_scale = pack(values)
    assert row_scale.tolist() == [pytest.approx(1 / 255), 0.0]
    assert packed.numbers.shape == (2, 48)
    assert packed.numbers[0, :2].tolist() == [15 | 9 << 4, 1 | 8 << 4]  # columns 0 and 16, 1 and 17
    assert packed.numbers[0, 33] == 15 | 8 << 4  # columns 65 and 81, which fills the row up
    assert packed.scales.tolist() == [[255, 29], [1, 1]]
    assert packed.bytes == 2 * (48 + 2)
    assert not packed.values()[1].any()


@given(st.integers(1, 4), st.integers(1, 140), st.integers(0, 2**31))
def test_numbers_on_the_grid_come_back(rows: int, columns: int, seed: int) -> None:
    """Whatever the shape: also where groups or runs do not fill the row."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-7, 8, (rows, columns), generator=generator).double()
    scales = torch.randint(1, 255, (rows, columns), generator=generator).double()
    scales[:, :INT4_GROUP] = 255  # the first group holds the row's largest number
    scales = scales[:, ::INT4_GROUP].repeat_interleave(INT4_GROUP, dim=1)[:, :columns]
    numbers[:, ::INT4_GROUP] = 7.0  # the range of each group ends at its largest
    packed, row_scale = pack(numbers * scales / 8)
    assert torch.allclose(packed.values().double() * row_scale[:, None], numbers * scales / 8, rtol=1e-12)


@given(st.integers(1, 200), st.integers(0, 2**31))
def test_no_group_is_worse_than_plain_rounding(columns: int, seed: int) -> None:
    values = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed)).double()
    packed, row_scale = pack(values)
    lost = packed.values().double() * row_scale[:, None] - values
    for first in range(0, columns, INT4_GROUP):
        part = values[:, first : first + INT4_GROUP]
        whole = (part.abs().amax(dim=1, keepdim=True) / 7 / row_scale[:, None]).round().clamp(1, 255)
        scale = whole * row_scale[:, None]
        plain = (part / scale).round().clamp(-7, 7) * scale - part
        own = lost[:, first : first + INT4_GROUP]
        assert bool(((own**2).sum(dim=1) <= (plain**2).sum(dim=1) + 1e-9).all())


@given(deltas())
def test_the_error_is_the_dense_one(form: LowRank) -> None:
    found, error = quantized(form)
    size = float(dense(form).norm())
    assert error == pytest.approx(float((dense(found.widened()) - dense(form)).norm()), rel=1e-6, abs=1e-9 * (1 + size))
    assert bool(found.d.isfinite().all())
    if size == 0:
        assert error == 0


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_random_factors_lose_about_a_seventh(rank: int) -> None:
    form = delta(rank, 576, 192, seed=rank)
    error = relative(quantized(form)[1], norm(form))
    assert 0.05 < error < 0.15
    assert relative(int8.quantized(form)[1], norm(form)) < error / 5


def test_a_bias_stays() -> None:
    form, bias = delta(2, 5, 4), torch.arange(4.0)
    found, _ = quantized(LowRank(form.a, form.b, form.d, bias))
    assert found.widened().bias is bias
    assert found.rank == 2


def test_the_reference_kernel_reads_them() -> None:
    form = delta(5, 70, 33, seed=9)
    found, _ = quantized(form)
    parts = [found.a.numbers, found.a.scales, found.b.numbers, found.b.scales, found.d]
    pool = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts[:4]])
    offset = len(pool) + -len(pool) % 4
    pool = torch.cat([pool, torch.zeros(offset - len(pool), dtype=torch.uint8), found.d.view(torch.uint8)])
    record = torch.full((1, RECORD_FIELDS), -1, dtype=torch.int64)
    record[0, Field.A], record[0, Field.B], record[0, Field.D] = 0, found.a.bytes, offset
    record[0, Field.RANK], record[0, Field.DTYPE] = 5, INT4
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    segments = Segments(torch.tensor([0]), torch.tensor([0, 3]), torch.arange(3), torch.ones(3))
    y = reference.lowrank(torch.zeros(3, 33), x, pool, record, segments)
    assert torch.allclose(y.double(), x.double() @ dense(found.widened()).T, rtol=1e-4, atol=1e-4)


def test_four_hundred_adapters_of_the_default_model_fit_a_gibibyte() -> None:
    """Pages of the pool included, which no two adapters share; every block ends on a cache line."""
    forms = [quantized(delta(16, *shape, seed=1))[0] for shape in LAYER]
    blocks = [size for form in forms for size in (form.a.bytes, form.b.bytes, 4 * 16)]
    taken = 30 * sum(-(-size // 64) * 64 for size in blocks)
    assert 400 * -(-taken // PAGE) * PAGE < 2**30
