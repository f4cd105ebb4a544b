"""8-bit factors: what they are, how near they stay, and that the kernels' meaning of them is ours."""

import pytest
import torch
from hypothesis import given

from adapters_store.compression.int8 import quantized, rounded
from adapters_store.compression.singular import distance, norm, relative
from adapters_store.forms import LowRank
from kernels import reference
from kernels.segments import FACTOR_DTYPES, RECORD_FIELDS, Field, Segments
from tests.adapters_store.compression.support import delta, deltas, dense


@given(deltas())
def test_every_factor_is_within_half_a_step(form: LowRank) -> None:
    found = rounded(form)
    assert (found.a.dtype, found.b.dtype, found.d.dtype) == (torch.int8, torch.int8, torch.float32)
    assert (found.a.shape, found.b.shape, found.d.shape) == (form.a.shape, form.b.shape, form.d.shape)
    for given_rows, rows in ((form.a.double(), found.a.double()), (form.b.double().T, found.b.double().T)):
        step = given_rows.abs().amax(dim=1, keepdim=True) / 127
        assert bool(((rows * step - given_rows).abs() <= step / 2 * (1 + 1e-9)).all())


@given(deltas())
def test_the_error_is_the_dense_one_and_never_worse_than_plain_rounding(form: LowRank) -> None:
    found, error = quantized(form)
    size = float(dense(form).norm())
    assert error == pytest.approx(float((dense(found) - dense(form)).norm()), rel=1e-6, abs=1e-12 * (1 + size))
    assert error <= distance(form, rounded(form))
    assert bool(found.d.isfinite().all())


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_random_factors_lose_about_a_percent(rank: int) -> None:
    form = delta(rank, 576, 192, seed=rank)
    error = relative(quantized(form)[1], norm(form))
    assert 0.004 < error < 0.015


def test_ranks_that_cancel_are_rounded_in_the_singular_form() -> None:
    small, large = delta(2, 40, 30, seed=1), delta(1, 40, 30, seed=2)
    form = LowRank(large.a + 0.1 * small.a, torch.cat([large.b, -large.b], dim=1) + 0.1 * small.b, torch.ones(2))
    plain, best = distance(form, rounded(form)), quantized(form)[1]
    assert best < plain / 3
    assert relative(best, norm(form)) < 0.02


def test_a_bias_stays() -> None:
    form = delta(2, 5, 4)
    bias = torch.arange(4.0)
    found, _ = quantized(LowRank(form.a, form.b, form.d, bias))
    assert found.bias is bias


def test_zeros_stay_zeros() -> None:
    found, error = quantized(LowRank(torch.zeros(2, 3), torch.zeros(4, 2), torch.ones(2)))
    assert (error, float(dense(found).abs().max())) == (0.0, 0.0)


def test_the_reference_kernel_reads_them() -> None:
    form = delta(5, 24, 16, seed=9)
    found, _ = quantized(form)
    blocks = [found.a, found.b.T.contiguous(), found.d]
    pool = torch.cat([block.contiguous().view(-1).view(torch.uint8) for block in blocks])
    record = torch.full((1, RECORD_FIELDS), -1, dtype=torch.int64)
    record[0, Field.A], record[0, Field.B], record[0, Field.D] = 0, 5 * 24, 5 * 24 + 5 * 16
    record[0, Field.RANK], record[0, Field.DTYPE] = 5, FACTOR_DTYPES.index(torch.int8)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    one = torch.ones(3)
    segments = Segments(torch.tensor([0]), torch.tensor([0, 3]), torch.arange(3), one)
    y = reference.lowrank(torch.zeros(3, 16), x, pool, record, segments)
    assert torch.allclose(y.double(), x.double() @ dense(found).T, rtol=1e-4, atol=1e-4)
