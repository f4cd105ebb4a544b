"""Adapters of many rows, whose factors the C++ kernels widen once and whose deltas they add in strips of columns.

Nothing but the time may differ: against the reference, against each row alone, and on any number of threads.
"""

import pytest
import torch

from kernels import dispatch, dispatch_forms, reference
from kernels.segments import Segments
from tests.kernels import form_support
from tests.kernels.gated import Spec, gated
from tests.kernels.support import (
    FACTORS,
    Group,
    by_threads,
    close,
    lowrank_adapter,
    pack,
    row_alone,
    segments_of,
    swapped,
)

pytestmark = pytest.mark.usefixtures("native")

RANKS = (1, 17, 64, 0, 300)  # 300: too large to be widened
# Slots 0 to 2 have many rows; rows 30 to 40 take two adapters, a row of slot 2 three; the last row is base.
GROUPS = [
    Group(0, range(41)),
    Group(1, range(30, 75), [0.5] * 45),
    Group(2, range(75, 140)),
    Group(3, range(100, 130)),
    Group(4, [80, *range(140, 170)]),
]
ROWS = 171


def by_itself(y: torch.Tensor, x: torch.Tensor, row: int) -> tuple[torch.Tensor, torch.Tensor, Segments]:
    return y[row : row + 1].clone(), x[row : row + 1], row_alone(GROUPS, row)


@pytest.mark.parametrize("core", [False, True], ids=["lowrank", "core"])
@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("inner", "outer"), [(576, 192), (123, 431), (17, 1), (1, 97)])
def test_matches_reference(dtype: torch.dtype, factor: torch.dtype | str, inner: int, outer: int, core: bool) -> None:
    atol = 5e-7 * (inner + max(RANKS)) ** 0.5
    adapters = [lowrank_adapter(r, inner, outer, factor, bias=r % 2 == 1 or r == 0, core=core) for r in RANKS]
    pool, records = pack(adapters)
    x, y, segments = torch.randn(ROWS, inner).to(dtype), torch.randn(ROWS, outer).to(dtype), segments_of(*GROUPS)
    expected = reference.lowrank(y.clone(), x, pool, records, segments)
    result = dispatch.lowrank(y.clone(), x, pool, records, segments)
    assert close(result, expected, atol)
    assert torch.equal(result[-1], y[-1])
    assert not close(dispatch.lowrank(y.clone(), x, pool, records, swapped(segments, 1, 2)), expected, atol)


@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_row_are_those_of_the_row_alone(dtype: torch.dtype, factor: torch.dtype | str) -> None:
    pool, records = pack([lowrank_adapter(r, 575, 431, factor, bias=r == 17, core=r == 64) for r in RANKS])
    x, y = torch.randn(ROWS, 575).to(dtype), torch.randn(ROWS, 431).to(dtype)
    whole = dispatch.lowrank(y.clone(), x, pool, records, segments_of(*GROUPS))
    for row in range(ROWS):
        own_y, own_x, own = by_itself(y, x, row)
        assert torch.equal(dispatch.lowrank(own_y, own_x, pool, records, own)[0], whole[row]), row


@pytest.mark.parametrize("factor", [torch.bfloat16, "int4"], ids=str)
def test_bits_of_a_gated_row_are_those_of_the_row_alone(factor: torch.dtype | str) -> None:
    own = gated(576, 431, [Spec(16, 16, 4), Spec(64, 8, 16), Spec(8, 0, 0), Spec(32, 32, 32), Spec(4, 4, 1)], factor)
    x, y = torch.randn(ROWS, 576), torch.randn(ROWS, 431)
    whole = dispatch.gated_lowrank(y.clone(), x, own.pool, own.records, own.gates, segments_of(*GROUPS))
    for row in range(ROWS):
        own_y, own_x, segments = by_itself(y, x, row)
        found = dispatch.gated_lowrank(own_y, own_x, own.pool, own.records, own.gates, segments)
        assert torch.equal(found[0], whole[row]), row


@pytest.mark.parametrize("outputs", [97, 256, 257], ids=str)  # 257: more than is widened
@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16, torch.int8, torch.bool], ids=str)
def test_bits_of_a_dense_delta_are_those_of_the_row_alone(factor: torch.dtype, outputs: int) -> None:
    pool, table = form_support.pack([form_support.dense(outputs, 123, factor) for _ in RANKS])
    x, y = torch.randn(ROWS, 123), torch.randn(ROWS, outputs)
    whole = dispatch_forms.dense_delta(y.clone(), x, pool, table, segments_of(*GROUPS))
    assert not torch.equal(whole, y)
    for row in range(0, ROWS, 3):
        own_y, own_x, own = by_itself(y, x, row)
        assert torch.equal(dispatch_forms.dense_delta(own_y, own_x, pool, table, own)[0], whole[row]), row


def test_bits_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    pool, records = pack([lowrank_adapter(r, 576, 1536, torch.bfloat16, core=r == 64) for r in RANKS])
    x, y, segments = torch.randn(ROWS, 576), torch.randn(ROWS, 1536), segments_of(*GROUPS)
    results = by_threads(lambda: dispatch.lowrank(y.clone(), x, pool, records, segments))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
