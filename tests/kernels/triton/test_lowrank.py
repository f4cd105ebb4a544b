"""Shrink, expand and the fused kernel against the reference: types, ranks, sizes, borders of memory, a row's bits."""

import pytest
import torch

from kernels import reference
from kernels.segments import Field, Limits, Segments
from kernels.triton import launch, lowrank
from kernels.triton.chunks import ChunkTable, chunks_of
from tests.kernels.support import FACTORS, Group, close, lowrank_adapter, segments_of, swapped
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.support import GROUPS, ROWS, UNIT, alone, on, on_device, packed, run

RANKS = (1, 3, 17, 64, 7, 0)
SPLIT = 2**-16  # error of h in two bfloat16 parts, per unit of the delta (`kernels.triton.factors`)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def step(inner: int, outer: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return on_device(torch.randn(ROWS, outer).to(dtype), torch.randn(ROWS, inner).to(dtype))


def check(
    ranks: tuple[int, ...],
    inner: int,
    outer: int,
    dtype: torch.dtype,
    factor: torch.dtype | str,
    fuse: bool,
    swap: int,
    core: bool = False,
) -> None:
    """Equal to the reference; base rows untouched; and the comparison notices an adapter in another's place."""
    pool, records = packed(
        [lowrank_adapter(r, inner, outer, factor, bias=r % 2 == 1 or r == 0, core=core and r != 7) for r in ranks]
    )
    (y, x), segments = step(inner, outer, dtype), segments_of(*GROUPS)
    expected = reference.lowrank(y.clone(), x, pool, records, on(segments))
    atol = UNIT * (inner + max(ranks)) ** 0.5
    if dtype != torch.float32:
        atol += SPLIT * float((expected - y).abs().max())

    result = run(y, x, pool, records, segments, fuse=fuse)

    assert close(result, expected, atol)
    assert torch.equal(result[ROWS - 1], y[ROWS - 1])
    wrong = reference.lowrank(y.clone(), x, pool, records, on(swapped(segments, swap, swap + 1)))
    assert not close(result, wrong, atol)


@pytest.mark.parametrize("fuse", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(dtype: torch.dtype, factor: torch.dtype | str, fuse: bool) -> None:
    check(RANKS, 70, 45, dtype, factor, fuse, swap=3)


@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_cores_match_the_reference(dtype: torch.dtype, factor: torch.dtype | str) -> None:
    """Several ranks, inputs in several parts, and between them an adapter without a core."""
    check(RANKS, 1030, 45, dtype, factor, False, swap=2, core=True)


def test_cores_are_a_matter_of_the_limits() -> None:
    """Without them the bits are the same where there are none; a core is not applied, as the limits say."""
    pool, records = packed([lowrank_adapter(r, 1030, 20, torch.bfloat16, core=r == 17) for r in RANKS])
    (y, x), segments = step(1030, 20, torch.float32), segments_of(*GROUPS)
    found = []
    for cores in (True, False):
        result = y.clone()
        lowrank.lowrank_group(
            [result], x, pool, [records], chunks_of(segments, DEVICE, Limits(cores=cores)), fuse=False
        )
        found.append(result)
    others = [row for row in range(ROWS) if row not in (2, 22)]  # whose adapter has the core
    assert torch.equal(found[0][others], found[1][others])
    assert not torch.equal(found[0][22], found[1][22])


@pytest.mark.parametrize("rank", [16, 33, 100, 256])
def test_every_rank_is_taken_exactly(rank: int) -> None:
    check((rank, 2, rank, 5, 2, 0), 40, 33, torch.bfloat16, torch.bfloat16, False, swap=1)


@pytest.mark.parametrize("fuse", [False, True], ids=["separate", "fused"])
def test_ranks_beyond_the_default_are_a_matter_of_the_limits(fuse: bool) -> None:
    pool, records = packed([lowrank_adapter(r, 20, 17, torch.bfloat16) for r in (300, 300, 5)])
    y, x = on_device(torch.randn(4, 17), torch.randn(4, 20))
    segments = segments_of(Group(0, [0, 2]), Group(1, [1]), Group(2, [2]))
    expected = reference.lowrank(y.clone(), x, pool, records, on(segments))
    assert close(run(y, x, pool, records, segments, fuse=fuse, width=300), expected, 2e-5)
    assert not close(run(y, x, pool, records, swapped(segments), fuse=fuse, width=300), expected, 2e-5)


@pytest.mark.parametrize(("inner", "outer"), [(1030, 17), (17, 1), (1, 130)])
def test_odd_sizes_and_inputs_in_parts(inner: int, outer: int) -> None:
    check(RANKS, inner, outer, torch.bfloat16, torch.bfloat16, False, swap=3)


@pytest.mark.deep
@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("inner", "outer"), [(576, 192), (123, 431), (1700, 64), (8200, 16), (16, 1100)])
@pytest.mark.parametrize("ranks", [(1, 2, 3, 5, 8, 0), (16, 17, 31, 64, 100, 0), (128, 255, 256, 7, 33, 0)], ids=str)
def test_sweep(dtype: torch.dtype, factor: torch.dtype | str, inner: int, outer: int, ranks: tuple[int, ...]) -> None:
    for fuse in (False, True):
        check(ranks, inner, outer, dtype, factor, fuse, swap=3)


def test_adapters_of_different_factor_types_stand_in_one_step() -> None:
    pool, records = packed([lowrank_adapter(9, 40, 24, FACTORS[i % 5], core=i == 3) for i in range(6)])
    (y, x), segments = step(40, 24, torch.bfloat16), segments_of(*GROUPS)
    expected = reference.lowrank(y.clone(), x, pool, records, on(segments))
    assert close(run(y, x, pool, records, segments), expected, 1e-5)


@pytest.mark.parametrize("factor", [torch.bfloat16, "int4"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_row_depend_on_nothing_but_the_row(dtype: torch.dtype, factor: torch.dtype | str) -> None:
    """Not on its batch-mates, not on its place, and not on which kernels the size of the batch chose."""
    pool, records = packed([lowrank_adapter(r, 1030, 20, factor, bias=r == 7) for r in RANKS])
    y, x = step(1030, 20, dtype)
    whole = run(y, x, pool, records, segments_of(*GROUPS), fuse=False)
    assert torch.equal(run(y, x, pool, records, segments_of(*GROUPS), fuse=True), whole)
    for row in (0, 19):
        one = run(y[row : row + 1], x[row : row + 1], pool, records, alone(row, GROUPS), fuse=True)
        assert torch.equal(one[0], whole[row]), row


def test_bits_under_a_core_depend_on_nothing_but_the_row() -> None:
    pool, records = packed([lowrank_adapter(r, 1030, 20, torch.bfloat16, core=r in (3, 64)) for r in RANKS])
    y, x = step(1030, 20, torch.float32)
    whole = run(y, x, pool, records, segments_of(*GROUPS))
    for row in (0, 2, 3):
        one = run(y[row : row + 1], x[row : row + 1], pool, records, alone(row, GROUPS))
        assert torch.equal(one[0], whole[row]), row


def test_several_deltas_of_one_row_are_rounded_once() -> None:
    """In bfloat16, 1 + 1/256 is 1: two deltas of 1/256 that are rounded one by one would be lost."""
    adapter = lowrank_adapter(0, 1, 5, torch.bfloat16, bias=True)
    assert adapter.bias is not None
    adapter.bias.fill_(2**-8)
    y, x = on_device(torch.ones(1, 5, dtype=torch.bfloat16), torch.randn(1, 1).bfloat16())
    result = run(y, x, *packed([adapter] * 2), segments_of(Group(0, [0]), Group(1, [0])))
    assert torch.equal(result, torch.full_like(y, 1 + 2**-7))


@pytest.mark.parametrize("segments", [segments_of(), segments_of(Group(0, []), Group(1, []))], ids=["none", "empty"])
def test_base_batch_is_left_alone(segments: Segments) -> None:
    pool, records = packed([lowrank_adapter(8, 16, 24, torch.bfloat16) for _ in range(2)])
    y, x = on_device(torch.randn(5, 24), torch.randn(5, 16))
    assert torch.equal(run(y, x, pool, records, segments), y)


@pytest.mark.parametrize("fuse", [False, True], ids=["separate", "fused"])
def test_nothing_beyond_the_rows_and_the_blocks_is_touched(fuse: bool) -> None:
    """x and y are windows of NaN; the pool's blocks have NaN between them (`PoolBuilder`) and stay as they are."""
    types: tuple[torch.dtype | str, ...] = (
        torch.bfloat16,
        "int4",
        torch.bfloat16,
        torch.float32,
        "int4",
        torch.bfloat16,
    )
    made = [lowrank_adapter(r, 70, 45, t, core=not fuse) for r, t in zip(RANKS, types, strict=True)]
    pool, records = packed(made)
    (plain_y, plain_x), segments, before = step(70, 45, torch.float32), segments_of(*GROUPS), pool.clone()
    wide_x, canvas = (torch.full((ROWS + 2, size + 64), torch.nan, device=DEVICE) for size in (70, 45))
    x, y = wide_x[1:-1, 20:90], canvas[1:-1, 20:65]
    x.copy_(plain_x)
    y.copy_(plain_y)
    expected = reference.lowrank(plain_y, plain_x, pool, records, on(segments))

    lowrank.lowrank_group([y], x, pool, [records], chunks_of(segments, DEVICE), fuse=fuse)

    assert close(y, expected, 1e-5)
    assert torch.equal(pool, before)
    y.fill_(torch.nan)
    assert bool(canvas.isnan().all()), "wrote outside of y"


def test_reads_and_writes_with_a_stride_inside_the_row() -> None:
    pool, records = packed([lowrank_adapter(5, 17, 23, torch.float32)])
    x, y = (tensor.T for tensor in on_device(torch.randn(17, 4), torch.randn(23, 4)))
    segments = segments_of(Group(0, range(4)))
    expected = reference.lowrank(y.clone(), x, pool, records, on(segments))
    lowrank.lowrank_group([y], x, pool, [records], chunks_of(segments, DEVICE))
    assert close(y, expected, 1e-5)


@pytest.mark.parametrize(("outers", "fuse"), [((45, 17), True), ((16, 70, 1), False)], ids=str)
def test_modules_that_share_x_are_done_together(outers: tuple[int, ...], fuse: bool) -> None:
    adapters = [[lowrank_adapter(r, 40, outer, torch.bfloat16) for r in RANKS] for outer in outers]
    pool, flat = packed([adapter for module in adapters for adapter in module])
    records = list(flat.view(len(outers), len(RANKS), -1))
    x, *ys = on_device(torch.randn(ROWS, 40), *(torch.randn(ROWS, outer) for outer in outers))
    segments = segments_of(*GROUPS)
    expected = [reference.lowrank(y.clone(), x, pool, r, on(segments)) for y, r in zip(ys, records, strict=True)]

    lowrank.lowrank_group(ys, x, pool, records, chunks_of(segments, DEVICE), fuse=fuse)

    assert [close(y, wanted, 1e-5) for y, wanted in zip(ys, expected, strict=True)] == [True] * len(ys)


@pytest.mark.parametrize("fuse", [False, True], ids=["separate", "fused"])
def test_unused_chunks_do_nothing(fuse: bool) -> None:
    pool, records = packed([lowrank_adapter(r, 40, 24, torch.bfloat16) for r in RANKS])
    y, x = step(40, 24, torch.float32)
    table, result = ChunkTable(40, 12, DEVICE), y.clone()
    table.fill(segments_of(*GROUPS))
    segments = segments_of(Group(3, [1]), Group(0, [4, 2]))
    lowrank.lowrank_group([result], x, pool, [records], table.fill(segments), fuse=fuse)
    assert torch.equal(result, run(y, x, pool, records, segments, fuse=fuse))
    assert not torch.equal(result[1], y[1])


def test_a_rank_that_the_buffer_cannot_hold_shows() -> None:
    pool, records = packed([lowrank_adapter(r, 20, 10, torch.bfloat16) for r in (8, 9)])
    y, x = on_device(torch.randn(3, 10), torch.randn(3, 20))
    segments = segments_of(Group(0, [0]), Group(1, [1]))
    result = run(y, x, pool, records, segments, fuse=False, width=8)
    assert result.isnan().any(dim=1).tolist() == [False, True, False]
    fused = run(y, x, pool, records, segments, fuse=True, width=8)
    assert close(fused, reference.lowrank(y.clone(), x, pool, records, on(segments)), 1e-5)


def test_a_module_that_the_adapter_leaves_alone_keeps_its_bits() -> None:
    pool, records = packed([lowrank_adapter(4, 20, 10, torch.bfloat16)] * 2)
    records[1, Field.RANK] = 0
    y, x = on_device(torch.full((2, 10), -0.0), torch.randn(2, 20))
    result = run(y, x, pool, records, segments_of(Group(0, [0]), Group(1, [1])))
    assert torch.equal(result[1].view(torch.int32), y[1].view(torch.int32))
    assert not torch.equal(result[0], y[0])


def test_which_launch_a_step_takes() -> None:
    """Code for several types of factors would spill registers in the fused kernel, with 4 bits in wide tiles too."""
    one, floats, every = 0b0010, 0b0111, 0b11111
    assert launch.fused(launch.DECODE_ENTRIES, 1024, 1024, one)
    assert not launch.fused(launch.DECODE_ENTRIES + 1, 1024, 1024, one)
    assert not launch.fused(1, 1024, 49152, one)
    assert not launch.fused(1, 1024, 1024, floats)
    assert (
        launch.expand_launch(torch.bfloat16, 49152, one).block
        == launch.expand_launch(torch.bfloat16, 49152, floats).block
        > launch.expand_launch(torch.bfloat16, 49152, every).block
    )
