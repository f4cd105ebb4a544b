"""C++ `lowrank` against the reference: types, ranks, odd sizes, borders of memory, and the bits of every row."""

import pytest
import torch

from kernels import dispatch, reference
from kernels.segments import Segments
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

RANKS = (1, 3, 7, 16, 17, 64, 128, 256, 0)
# Rows 0 and 2 take several adapters, slot 5 has a whole tile of rows and a rest, row 29 is base.
GROUPS = [
    Group(0, [0], [0.5]),
    Group(1, [1, 0], [1.0, -0.75]),
    Group(2, [2]),
    Group(3, [3, 4]),
    Group(4, [5, 2, 6], [1.0, 2.0, 0.3]),
    Group(5, range(7, 20)),
    Group(6, []),
    Group(7, [20, 21]),
    Group(8, [22, 0]),
    Group(5, range(23, 29)),
]
ROWS = 30


@pytest.mark.parametrize("core", [False, True], ids=["lowrank", "core"])
@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float32, 5e-7), (torch.bfloat16, 5e-7), (torch.float16, 5e-7)], ids=str
)
@pytest.mark.parametrize(("inner", "outer"), [(576, 192), (123, 431), (431, 123), (17, 1), (1, 17)])
def test_matches_reference(
    dtype: torch.dtype, unit: float, factor: torch.dtype | str, inner: int, outer: int, core: bool
) -> None:
    """`unit`: error per square root of the sum's length, for results of about unit size; see also RTOL."""
    atol = unit * (inner + max(RANKS)) ** 0.5
    pool, records = pack(
        [lowrank_adapter(r, inner, outer, factor, bias=r % 2 == 1 or r == 0, core=core) for r in RANKS]
    )
    x, y = torch.randn(ROWS, inner).to(dtype), torch.randn(ROWS, outer).to(dtype)
    segments = segments_of(*GROUPS)
    expected = reference.lowrank(y.clone(), x, pool, records, segments)

    result = dispatch.lowrank(y.clone(), x, pool, records, segments)

    assert result.dtype == dtype
    assert close(result, expected, atol)
    assert torch.equal(result[29], y[29])
    assert not close(dispatch.lowrank(y.clone(), x, pool, records, swapped(segments, 4, 5)), expected, atol)


def test_one_swapped_row_of_a_rank_one_adapter_is_noticed() -> None:
    pool, records = pack([lowrank_adapter(1, 16384, 32, torch.bfloat16) for _ in range(2)])
    x, y = torch.randn(2, 16384), torch.zeros(2, 32)
    segments = segments_of(Group(0, [0]), Group(1, [1]))
    expected = reference.lowrank(y.clone(), x, pool, records, segments)
    assert close(dispatch.lowrank(y.clone(), x, pool, records, segments), expected, 1e-4)
    assert not close(dispatch.lowrank(y.clone(), x, pool, records, swapped(segments)), expected, 1e-4)


@pytest.mark.parametrize("segments", [segments_of(), segments_of(Group(0, []), Group(1, []))], ids=["none", "empty"])
def test_base_batch_is_left_alone(segments: Segments) -> None:
    pool, records = pack([lowrank_adapter(8, 16, 24, torch.bfloat16) for _ in range(2)])
    y = torch.randn(5, 24)
    assert torch.equal(dispatch.lowrank(y.clone(), torch.randn(5, 16), pool, records, segments), y)


def test_a_module_without_lowrank_part_adds_its_weighted_bias() -> None:
    adapter = lowrank_adapter(0, 16, 431, torch.bfloat16, bias=True)
    pool, records = pack([adapter])
    y = torch.randn(3, 431)
    result = dispatch.lowrank(y.clone(), torch.randn(3, 16), pool, records, segments_of(Group(0, [1], [0.5])))
    assert adapter.bias is not None
    assert torch.equal(result, torch.stack([y[0], y[1] + 0.5 * adapter.bias, y[2]]))


def test_several_deltas_of_one_row_are_rounded_once() -> None:
    """In bfloat16, 1 + 1/256 is 1: two deltas of 1/256 that are rounded one by one would be lost."""
    adapter = lowrank_adapter(0, 1, 5, torch.bfloat16, bias=True)
    assert adapter.bias is not None
    adapter.bias.fill_(2**-8)
    y = torch.ones(1, 5, dtype=torch.bfloat16)
    result = dispatch.lowrank(
        y, torch.randn(1, 1).bfloat16(), *pack([adapter] * 2), segments_of(Group(0, [0]), Group(1, [0]))
    )
    assert torch.equal(result, torch.full((1, 5), 1 + 2**-7, dtype=torch.bfloat16))


def test_reads_strided_rows_and_writes_within_its_columns() -> None:
    pool, records = pack([lowrank_adapter(r, 123, 431, torch.bfloat16) for r in (3, 16)])
    segments = segments_of(Group(0, [0, 1]), Group(1, [2, 3, 4, 5, 6]))
    wide_x, canvas = torch.randn(7, 300), torch.full((9, 500), 7.0)
    x, y = wide_x[:, 100:223], canvas[1:8, 20:451]
    expected = reference.lowrank(y.clone(), x, pool, records, segments)

    dispatch.lowrank(y, x, pool, records, segments)

    assert close(y, expected, 1e-5)
    y.fill_(7.0)
    assert bool((canvas == 7.0).all()), "wrote outside of y"


def test_reads_and_writes_with_a_stride_inside_the_row() -> None:
    pool, records = pack([lowrank_adapter(5, 17, 23, torch.float32)])
    x, y, segments = torch.randn(17, 4).T, torch.randn(23, 4).T, segments_of(Group(0, range(4)))
    expected = reference.lowrank(y.clone(), x, pool, records, segments)
    assert close(dispatch.lowrank(y, x, pool, records, segments), expected, 1e-5)


def test_records_may_be_one_column_of_a_table_of_modules() -> None:
    pool, records = pack([lowrank_adapter(5, 17, 23, torch.float32) for _ in range(6)])
    table = records.view(3, 2, -1)  # slots, modules
    x, y, segments = torch.randn(4, 17), torch.randn(4, 23), segments_of(Group(2, [0, 1]), Group(1, [3]))
    expected = reference.lowrank(y.clone(), x, pool, table[:, 1], segments)
    assert close(dispatch.lowrank(y, x, pool, table[:, 1], segments), expected, 1e-5)


@pytest.mark.parametrize("factor", [torch.bfloat16, "int4"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_row_do_not_depend_on_batch_mates(dtype: torch.dtype, factor: torch.dtype | str) -> None:
    pool, records = pack([lowrank_adapter(r, 576, 431, factor, bias=r == 7, core=r in (17, 64)) for r in RANKS])
    x, y = torch.randn(ROWS, 576).to(dtype), torch.randn(ROWS, 431).to(dtype)
    whole = dispatch.lowrank(y.clone(), x, pool, records, segments_of(*GROUPS))
    for row in range(ROWS):
        alone = row_alone(GROUPS, row)
        one = dispatch.lowrank(y[row : row + 1].clone(), x[row : row + 1], pool, records, alone)
        assert torch.equal(one[0], whole[row]), row


@pytest.mark.parametrize("shared", [False, True])
def test_bits_do_not_depend_on_the_number_of_threads(shared: bool, threads: None) -> None:
    types: tuple[torch.dtype | str, ...] = (torch.bfloat16, "int4", torch.int8, "int4")
    adapters = [lowrank_adapter(r, 576, 1536, t, core=r > 32) for r, t in zip((8, 64, 16, 33), types, strict=True)]
    pool, records = pack(adapters)
    groups = [Group(0, [0, 7, 8]), Group(1, [1, 2]), Group(2, range(3, 7)), Group(3, [9, 0] if shared else [9])]
    x, y, segments = torch.randn(10, 576), torch.randn(10, 1536), segments_of(*groups)
    results = by_threads(lambda: dispatch.lowrank(y.clone(), x, pool, records, segments))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_compiles_into_one_graph() -> None:
    pool, records = pack([lowrank_adapter(8, 32, 48, torch.float32)])
    segments = segments_of(Group(0, [0, 2]))

    def module(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return dispatch.lowrank(x @ weight, x, pool, records, segments).relu()

    x, weight = torch.randn(3, 32), torch.randn(32, 48)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert close(compiled(x, weight), module(x, weight), 1e-5)
