"""Replaced weights against the reference: types, weighted compositions, rows without one, borders of memory."""

import pytest
import torch

from kernels import reference
from kernels.segments import Segments
from kernels.triton import lowrank
from kernels.triton.chunks import ChunkTable, chunks_of
from tests.kernels.support import Adapter, Group, close, lowrank_adapter, replacement, segments_of, swapped
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.support import GROUPS, ROWS, UNIT, alone, on, on_device, packed

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def heads(inner: int, outer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot 2 has no replacement, every second one a bias."""
    adapters = [replacement(inner, outer, dtype, bias=i % 2 == 1) for i in range(6)]
    adapters[2] = lowrank_adapter(4, inner, outer, dtype)
    return packed(adapters)


def replace(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, records: torch.Tensor, segments: Segments
) -> torch.Tensor:
    result = y.clone()
    lowrank.replace_weight(result, x, pool, records, chunks_of(segments, DEVICE))
    return result


@pytest.mark.parametrize("factor", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(dtype: torch.dtype, factor: torch.dtype) -> None:
    pool, records = heads(70, 77, factor)
    y, x = on_device(torch.randn(ROWS, 77).to(dtype), torch.randn(ROWS, 70).to(dtype))
    segments = segments_of(*GROUPS)
    expected = reference.replace_weight(y.clone(), x, pool, records, on(segments))

    result = replace(y, x, pool, records, segments)

    atol = UNIT * 70**0.5
    assert close(result, expected, atol)
    assert torch.equal(result[ROWS - 1], y[ROWS - 1])
    wrong = reference.replace_weight(y.clone(), x, pool, records, on(swapped(segments, 3, 4)))
    assert not close(result, wrong, atol)


@pytest.mark.parametrize(("inner", "outer"), [(1, 130), (257, 1)])
def test_odd_sizes(inner: int, outer: int) -> None:
    pool, records = heads(inner, outer, torch.bfloat16)
    y, x = on_device(torch.randn(ROWS, outer), torch.randn(ROWS, inner))
    expected = reference.replace_weight(y.clone(), x, pool, records, on(segments_of(*GROUPS)))
    assert close(replace(y, x, pool, records, segments_of(*GROUPS)), expected, 1e-5)


def test_a_whole_replacement_leaves_nothing_of_the_base_and_a_row_without_one_keeps_its_bits() -> None:
    pool, records = packed([replacement(20, 10, torch.float32), Adapter()])
    y, x = on_device(torch.full((2, 10), torch.nan), torch.randn(2, 20))
    y[1] = -0.0
    result = replace(y, x, pool, records, segments_of(Group(0, [0]), Group(1, [1])))
    assert bool(result[0].isfinite().all())
    assert torch.equal(result[1].view(torch.int32), y[1].view(torch.int32))


def test_bits_of_a_row_depend_on_the_row_alone() -> None:
    pool, records = heads(70, 40, torch.bfloat16)
    y, x = on_device(torch.randn(ROWS, 40).bfloat16(), torch.randn(ROWS, 70).bfloat16())
    whole = replace(y, x, pool, records, segments_of(*GROUPS))
    for row in (0, 3, 19):
        one = replace(y[row : row + 1], x[row : row + 1], pool, records, alone(row, GROUPS))
        assert torch.equal(one[0], whole[row]), row


def test_nothing_beyond_the_rows_is_touched_and_unused_chunks_do_nothing() -> None:
    pool, records = heads(30, 45, torch.float32)
    before = pool.clone()
    canvas, wide_x = (torch.full((ROWS + 2, size + 40), torch.nan, device=DEVICE) for size in (45, 30))
    y, x = canvas[1:-1, 20:65], wide_x[1:-1, 20:50]
    y.copy_(torch.randn(ROWS, 45))
    x.copy_(torch.randn(ROWS, 30))
    expected = reference.replace_weight(y.contiguous(), x, pool, records, on(segments_of(*GROUPS)))
    lowrank.replace_weight(y, x, pool, records, ChunkTable(64, 20, DEVICE).fill(segments_of(*GROUPS)))
    assert close(y, expected, 1e-5)
    assert torch.equal(pool, before)
    y.fill_(torch.nan)
    assert bool(canvas.isnan().all()), "wrote outside of y"


def test_int8_without_scales_shows() -> None:
    weight = torch.randint(-9, 9, (5, 8), dtype=torch.int8)
    pool, records = packed([Adapter(weight=weight, dtype=torch.int8)])
    y, x = on_device(torch.randn(1, 5), torch.randn(1, 8))
    assert bool(replace(y, x, pool, records, segments_of(Group(0, [0]))).isnan().all())
