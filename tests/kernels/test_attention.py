"""C++ `paged_attention` and `write_kv` against the reference, and the bits of every query."""

import pytest
import torch

from kernels import dispatch, reference
from tests.kernels.support import close, paged

pytestmark = pytest.mark.usefixtures("native")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS, QUERIES = [100, 1, 700, 33, 1100], [1, 1, 50, 33, 1]  # decode and prefill in one step; partitions of 512


@pytest.mark.parametrize("pool_dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 4e-6), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)], ids=str
)
def test_matches_reference_over_types(dtype: torch.dtype, atol: float, pool_dtype: torch.dtype) -> None:
    world = paged(LENGTHS, QUERIES, dtype=dtype, pool_dtype=pool_dtype)
    expected = reference.paged_attention(*world.arguments(), world.scale)

    result = dispatch.paged_attention(*world.arguments(), world.scale)

    assert result.dtype == dtype
    assert result.is_contiguous()
    assert close(result, expected, atol)
    first, last = 0, 3
    world.block_table[[first, last]] = world.block_table[[last, first]].clamp(min=0)
    assert not close(dispatch.paged_attention(*world.arguments(), world.scale), expected, atol)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size"),
    [(9, 3, 64, 16), (4, 4, 17, 7), (8, 1, 80, 16), (14, 2, 128, 32), (5, 5, 8, 1), (1, 1, 1, 3), (40, 1, 64, 16)],
)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (20, 0.0), (600, 2.0), (1, 0.0), (0, 2.0)])
def test_matches_reference_over_shapes(
    heads: int, kv_heads: int, dim: int, page_size: int, window: int, softcap: float
) -> None:
    world = paged(LENGTHS, QUERIES, heads=heads, kv_heads=kv_heads, dim=dim, page_size=page_size)
    expected = reference.paged_attention(*world.arguments(), world.scale, window, softcap)
    assert close(dispatch.paged_attention(*world.arguments(), world.scale, window, softcap), expected, 4e-6)


@pytest.mark.parametrize("window", [0, 40])
def test_bits_of_a_query_do_not_depend_on_batch_mates(window: int, threads: None) -> None:
    world = paged(LENGTHS, QUERIES, dtype=torch.bfloat16, pool_dtype=torch.bfloat16)
    whole = dispatch.paged_attention(*world.arguments(), world.scale, window)
    for count in (1, 2):
        torch.set_num_threads(count)
        for request in range(len(LENGTHS)):
            first, last = world.query_start[request : request + 2].tolist()
            alone = dispatch.paged_attention(*world.only(request), world.scale, window)
            assert torch.equal(alone, whole[first:last])


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("sizes", [(1,) * 70, (16, 16, 38), (3, 60, 7), (69, 1)])
def test_bits_of_a_prompt_do_not_depend_on_its_chunks(sizes: tuple[int, ...], window: int) -> None:
    world = paged([1070], [70])
    whole = dispatch.paged_attention(*world.arguments(), world.scale, window)
    begin = 0
    for size in sizes:
        part = dispatch.paged_attention(*world.only(0, begin, begin + size), world.scale, window)
        assert torch.equal(part, whole[begin : begin + size])
        begin += size


def test_pages_before_the_window_may_be_gone() -> None:
    world = paged([100], [4])
    expected = reference.paged_attention(*world.arguments(), world.scale, 20)
    world.block_table[0, :4] = -1  # keys 0 to 63; the first query sees 77 to 96
    for attention in (dispatch.paged_attention, reference.paged_attention):
        assert close(attention(*world.arguments(), world.scale, 20), expected, 4e-6)


def test_reads_strided_queries_and_leaves_padding_zero() -> None:
    world = paged([30, 50], [2, 1])
    expected = reference.paged_attention(*world.arguments(), world.scale)
    fused = torch.full((7, 15, 64), torch.nan)  # q, k and v of a fused projection, and four rows of padding
    fused[:3, :9] = world.query
    world.query = fused[:, :9]
    result = dispatch.paged_attention(*world.arguments(), world.scale)
    assert close(result[:3], expected, 4e-6)
    assert torch.equal(result[3:], torch.zeros(4, 9, 64))


def test_scores_far_from_zero_stay_finite() -> None:
    world = paged([600], [3])
    world.query *= 1000
    expected = reference.paged_attention(*world.arguments(), world.scale)
    result = dispatch.paged_attention(*world.arguments(), world.scale)
    assert bool(result.isfinite().all())
    assert close(result, expected, 2e-3)  # the scores reach some thousands: their own rounding is 2e-4


def test_no_requests() -> None:
    world = paged([5], [1])
    none = torch.zeros(0, dtype=torch.int32)
    start, table = torch.zeros(1, dtype=torch.int32), torch.zeros(0, 1, dtype=torch.int32)
    out = dispatch.paged_attention(world.query, world.key_pool, world.value_pool, start, none, table, 1.0)
    assert torch.equal(out, torch.zeros_like(world.query))


@pytest.mark.parametrize("pool_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (1, 17), (5, 1)])
def test_write_kv_matches_reference(dtype: torch.dtype, pool_dtype: torch.dtype, heads: int, dim: int) -> None:
    tokens = 23
    canvas = torch.full((6, 2, 2, 16, heads, dim), 7.0, dtype=pool_dtype)
    fused = torch.randn(tokens, 3 * heads, dim).to(dtype)
    key, value, slots = fused[:, :heads], fused[:, 2 * heads :], torch.randperm(96)[:tokens]
    expected = canvas.clone()
    reference.write_kv(key, value, expected[:, 0, 1], expected[:, 1, 1], slots)
    dispatch.write_kv(key, value, canvas[:, 0, 1], canvas[:, 1, 1], slots)
    assert torch.equal(canvas, expected)

    swapped = canvas.clone()
    dispatch.write_kv(value, key, swapped[:, 0, 1], swapped[:, 1, 1], slots)
    assert not torch.equal(swapped, expected)


def test_attention_reads_what_write_kv_stored_inside_a_compiled_graph() -> None:
    world = paged([20], [1])
    key, value, slots = torch.randn(1, 3, 64), torch.randn(1, 3, 64), world.block_table[0, 1:2].long() * 16 + 3

    def layer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        dispatch.write_kv(key, value, world.key_pool, world.value_pool, slots)
        return dispatch.paged_attention(query, *world.arguments()[1:], world.scale) + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    result = compiled(world.query, key, value)
    assert torch.equal(world.key_pool[world.block_table[0, 1], 3], key[0])
    assert close(result, layer(world.query, key, value), 1e-6)
