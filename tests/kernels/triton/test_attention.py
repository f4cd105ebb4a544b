"""Paged attention and `write_kv` against the reference: types, shapes, pieces of a prompt, borders of memory, bits."""

import pytest
import torch

from kernels import reference
from kernels.triton import attention, launch
from tests.kernels.support import AttentionInputs, Paged, close, paged
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.support import on_device

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS, QUERIES = [70, 1, 33, 530, 20], [1, 1, 33, 1, 0]  # decode, first token, prompt, two partitions, nothing
# Probabilities are rounded to the type of the values, up to half a unit of their last place.
ATOL = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def attend(
    arguments: AttentionInputs, scale: float, window: int = 0, softcap: float = 0.0, split: bool | None = None
) -> torch.Tensor:
    query, key_pool, value_pool, start, length, table = on_device(*arguments)
    return attention.attention(query, key_pool, value_pool, start, length, table, scale, window, softcap, split).cpu()


def agrees(world: Paged, window: int = 0, softcap: float = 0.0, split: bool | None = None) -> bool:
    expected = reference.paged_attention(*world.arguments(), world.scale, window, softcap)
    return close(attend(world.arguments(), world.scale, window, softcap, split), expected, ATOL[world.query.dtype])


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [*zip(FLOATS, FLOATS, strict=True), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
    ids=str,
)
def test_matches_reference(dtype: torch.dtype, pool_dtype: torch.dtype, split: bool) -> None:
    """And notices when two requests' pages are exchanged."""
    world = paged(LENGTHS, QUERIES, dtype=dtype, pool_dtype=pool_dtype)
    expected = reference.paged_attention(*world.arguments(), world.scale)
    assert close(attend(world.arguments(), world.scale, split=split), expected, ATOL[dtype])
    first, last = 0, 3
    world.block_table[[first, last]] = world.block_table[[last, first]].clamp(min=0)
    assert not close(attend(world.arguments(), world.scale, split=split), expected, ATOL[dtype])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size"),
    [(4, 4, 17, 7), (8, 1, 80, 16), (4, 2, 128, 32), (2, 2, 96, 1), (1, 1, 1, 3), (20, 1, 64, 16), (2, 1, 256, 16)],
)
@pytest.mark.parametrize(("window", "softcap"), [(0, 2.0), (20, 0.0)])
def test_shapes_windows_and_caps(
    heads: int, kv_heads: int, dim: int, page_size: int, window: int, softcap: float
) -> None:
    assert agrees(
        paged([70, 9, 33], [1, 9, 20], heads=heads, kv_heads=kv_heads, dim=dim, page_size=page_size), window, softcap
    )


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize(("window", "softcap"), [(1, 0.0), (515, 2.0), (40, 0.0)])
def test_windows_over_partitions(window: int, softcap: float, split: bool) -> None:
    assert agrees(paged([1060, 530], [2, 1], heads=2, kv_heads=1, dim=16), window, softcap, split)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_the_row_alone(dtype: torch.dtype) -> None:
    """Not on its batch-mates, not on the pieces its prompt comes in, and not on whether partitions are split."""
    world = paged([600, 70], [30, 1], heads=3, kv_heads=1, dim=32, dtype=dtype, pool_dtype=dtype)
    whole = attend(world.arguments(), world.scale, split=False)
    assert torch.equal(attend(world.arguments(), world.scale, split=True), whole)
    assert torch.equal(attend(world.only(1), world.scale), whole[30:])
    begin = 0
    for size in (1, 7, 16, 6):
        part = attend(world.only(0, begin, begin + size), world.scale)
        assert torch.equal(part, whole[begin : begin + size])
        begin += size


def test_pages_before_the_window_may_be_gone() -> None:
    world = paged([100], [4], heads=2, kv_heads=1, dim=16)
    expected = reference.paged_attention(*world.arguments(), world.scale, 20)
    world.block_table[0, :4] = 2**30  # keys 0 to 63; the first query sees 77 to 96
    assert close(attend(world.arguments(), world.scale, 20), expected, 4e-6)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_nothing_but_the_rows_is_read_or_written(split: bool) -> None:
    """Unwritten places of the pages are NaN, q is a window of NaN, and rows of no request (padding) stay zero."""
    world = paged([530, 18], [1, 2], heads=4, kv_heads=2, dim=24)
    expected = reference.paged_attention(*world.arguments(), world.scale)
    before = world.key_pool.clone(), world.value_pool.clone()
    fused = torch.full((7, 8, 40), torch.nan)
    fused[:3, 2:6, 8:32] = world.query
    world.query = fused[:, 2:6, 8:32]
    result = attend(world.arguments(), world.scale, split=split)
    assert close(result[:3], expected, 4e-6)
    assert torch.equal(result[3:], torch.zeros(4, 4, 24))
    assert torch.equal(world.key_pool.nan_to_num(7.0), before[0].nan_to_num(7.0))
    assert torch.equal(world.value_pool.nan_to_num(7.0), before[1].nan_to_num(7.0))


def test_steps_without_requests_and_requests_without_keys() -> None:
    world = paged([5], [1])
    none = torch.zeros(0, dtype=torch.int32)
    start, table = torch.zeros(1, dtype=torch.int32), torch.zeros(0, 1, dtype=torch.int32)
    out = attend((world.query, world.key_pool, world.value_pool, start, none, table), 1.0)
    assert torch.equal(out, torch.zeros_like(world.query))
    assert agrees(paged([5, 0, 0, 20, 0], [1, 0, 0, 3, 0]))


def test_scores_far_from_zero_stay_finite() -> None:
    world = paged([90], [3], heads=2, kv_heads=1)
    world.query *= 1000
    expected = reference.paged_attention(*world.arguments(), world.scale)
    assert close(attend(world.arguments(), world.scale), expected, 2e-3)  # scores reach some thousands


def test_a_row_with_a_bad_number_shows_it_and_no_other_does() -> None:
    world = paged([20, 20], [1, 1], heads=2, kv_heads=1, dim=16)
    world.query[0, 0, 3] = torch.nan
    bad = attend(world.arguments(), world.scale).isnan()
    assert bad[0, 0].all()
    assert int(bad.sum()) == 16


def test_partitions_are_split_where_rows_are_few() -> None:
    assert launch.split(programs=8, partitions=4)
    assert not launch.split(programs=8, partitions=1), "nothing to split"
    assert not launch.split(programs=launch.SPLIT_PROGRAMS + 1, partitions=4)
    assert not launch.split(programs=200, partitions=1000)


@pytest.mark.parametrize("pool_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (1, 17), (9, 128)])
def test_write_kv_matches_reference(dtype: torch.dtype, pool_dtype: torch.dtype, heads: int, dim: int) -> None:
    """Rows of padding (slot -1) go nowhere; what lies between the layers of a page stays."""
    (canvas,) = on_device(torch.full((4, 2, 2, 16, heads, dim), 7.0, dtype=pool_dtype))
    (fused,) = on_device(torch.randn(9, 3 * heads, dim).to(dtype))
    (slots,) = on_device(torch.randperm(64)[:9])
    slots[[2, 8]] = -1
    key, value, expected = fused[:, :heads], fused[:, 2 * heads :], canvas.clone()
    reference.write_kv(key, value, expected[:, 0, 1], expected[:, 1, 1], slots)
    attention.write_kv(key, value, canvas[:, 0, 1], canvas[:, 1, 1], slots)
    assert torch.equal(canvas, expected)
    assert int((canvas != 7.0).sum()) >= 2 * 7 * heads * dim * 0.99

    attention.write_kv(value, key, canvas[:, 0, 1], canvas[:, 1, 1], slots)
    assert not torch.equal(canvas, expected)


def test_write_kv_takes_heads_before_rows_as_models_have_them() -> None:
    pool = torch.zeros(2, 2, 16, 3, 8, device=DEVICE)
    key, value = (torch.randn(3, 5, 8, device=DEVICE).transpose(0, 1) for _ in range(2))
    slots = torch.arange(14, 19, device=DEVICE)
    attention.write_kv(key, value, pool[:, 0], pool[:, 1], slots)
    assert torch.equal(pool[:, 0].reshape(32, 3, 8)[14:19], key)
    assert torch.equal(pool[:, 1].reshape(32, 3, 8)[14:19], value)
    attention.write_kv(key[:0], value[:0], pool[:, 0], pool[:, 1], slots[:0])
