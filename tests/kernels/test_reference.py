"""The specification itself, against dense float64 arithmetic and torch's own attention."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from kernels import reference
from tests.kernels.support import (
    FACTORS,
    Adapter,
    Group,
    Paged,
    close,
    lowrank_adapter,
    pack,
    paged,
    replacement,
    segments_of,
    swapped,
)

ROWS, INNER, OUTER = 9, 123, 17
GROUPS = [Group(0, [0, 3], [1.0, 0.5]), Group(1, [1]), Group(2, [3, 8], [-0.25, 1.0]), Group(3, [4]), Group(2, [])]


def dense(factor: torch.Tensor, rank: int, dtype: torch.dtype | str) -> torch.Tensor:
    """A factor in float64; four bits are read one by one, as the layout is described."""
    if dtype != "int4":
        return factor.double()
    columns = {rank * (-(-size // 32) * 16 + -(-size // 64)): size for size in (INNER, OUTER)}[len(factor)]
    row_bytes, groups = -(-columns // 32) * 16, -(-columns // 64)
    rows = torch.empty(rank, columns, dtype=torch.float64)
    for row in range(rank):
        for column in range(columns):
            byte = int(factor[row * row_bytes + column // 32 * 16 + column % 16])
            number = (byte >> 4 if column % 32 >= 16 else byte & 15) - 8
            rows[row, column] = number * int(factor[rank * row_bytes + row * groups + column // 64])
    return rows


def dense_delta(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    delta = torch.zeros(OUTER, dtype=torch.float64)
    if adapter.a is not None and adapter.b is not None and adapter.d is not None:
        a, b = (dense(factor, len(adapter.d), adapter.dtype) for factor in (adapter.a, adapter.b))
        middle = torch.diag(adapter.d.double())
        middle = middle if adapter.core is None else adapter.core.double().T @ middle
        merged = b.T @ middle @ a
        delta = merged @ x.double()
    return delta if adapter.bias is None else delta + adapter.bias.double()


@pytest.mark.parametrize("core", [False, True], ids=["lowrank", "core"])
@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10), (torch.bfloat16, 1e-2)], ids=str
)
def test_lowrank_is_the_dense_sum_of_merged_weights(
    dtype: torch.dtype, atol: float, factor: torch.dtype | str, core: bool
) -> None:
    adapters = [lowrank_adapter(rank, INNER, OUTER, factor, bias=rank != 7, core=core) for rank in (1, 7, 16, 0)]
    pool, records = pack(adapters)
    x, y = torch.randn(ROWS, INNER).to(dtype), torch.randn(ROWS, OUTER).to(dtype)
    expected = y.to(torch.float64, copy=True)
    for group in GROUPS:
        for row, weight in group.weighted():
            expected[row] += weight * dense_delta(adapters[group.slot], x[row])

    segments = segments_of(*GROUPS)
    result = reference.lowrank(y.clone(), x, pool, records, segments)

    assert close(result, expected.to(dtype), atol)
    assert torch.equal(result[[2, 5, 6, 7]], y[[2, 5, 6, 7]])
    assert not close(reference.lowrank(y.clone(), x, pool, records, swapped(segments)), expected.to(dtype), atol)


def test_lowrank_counts_a_row_that_stands_twice_in_one_segment() -> None:
    pool, records = pack([lowrank_adapter(4, INNER, OUTER, torch.float32)])
    x, y = torch.randn(1, INNER), torch.zeros(1, OUTER)
    twice = reference.lowrank(y.clone(), x, pool, records, segments_of(Group(0, [0, 0])))
    assert close(twice, 2 * reference.lowrank(y.clone(), x, pool, records, segments_of(Group(0, [0]))), 1e-6)


@pytest.mark.parametrize("core", [False, True], ids=["lowrank", "core"])
def test_embedding_is_lowrank_of_one_hot_rows(core: bool) -> None:
    vocabulary = 29
    ranks = (3, 8, 16, 1)
    table = [lowrank_adapter(rank, vocabulary, OUTER, torch.bfloat16, embedding=True, core=core) for rank in ranks]
    dense = [replace(t, a=None if t.a is None else t.a.T.contiguous()) for t in table]
    ids, y, segments = torch.randint(vocabulary, (ROWS,)), torch.randn(ROWS, OUTER), segments_of(*GROUPS)
    one_hot = functional.one_hot(ids, vocabulary).float()

    result = reference.lowrank_embedding(y.clone(), ids, *pack(table), segments)

    assert close(result, reference.lowrank(y.clone(), one_hot, *pack(dense), segments), 1e-5)
    assert not close(reference.lowrank_embedding(y.clone(), ids, *pack(table), swapped(segments)), result, 1e-5)


def test_replace_weight_mixes_own_and_base_products() -> None:
    adapters = [
        replacement(INNER, OUTER, torch.bfloat16, bias=True),
        replacement(INNER, OUTER, torch.float32),
        replacement(INNER, OUTER, torch.float16),
        lowrank_adapter(2, INNER, OUTER, torch.float32),
    ]
    pool, records = pack(adapters)
    x, y, segments = torch.randn(ROWS, INNER), torch.randn(ROWS, OUTER), segments_of(*GROUPS)
    expected = y.to(torch.float64, copy=True)
    for group in GROUPS[:3]:
        for row, weight in group.weighted():
            adapter = adapters[group.slot]
            assert adapter.weight is not None
            own = adapter.weight.double() @ x[row].double()
            own += 0.0 if adapter.weight_bias is None else adapter.weight_bias.double()
            expected[row] += weight * (own - y[row].double())

    result = reference.replace_weight(y.clone(), x, pool, records, segments)

    assert close(result, expected.float(), 1e-5)
    assert torch.equal(result[[2, 4, 5]], y[[2, 4, 5]])
    assert not close(reference.replace_weight(y.clone(), x, pool, records, swapped(segments)), expected.float(), 1e-5)


def test_replace_weight_of_one_leaves_nothing_of_the_base_product() -> None:
    pool, records = pack([replacement(INNER, OUTER, torch.float32)])
    x, segments = torch.randn(1, INNER), segments_of(Group(0, [0]))
    small = reference.replace_weight(torch.zeros(1, OUTER), x, pool, records, segments)
    for base in (1e9, torch.inf, torch.nan):
        assert torch.equal(reference.replace_weight(torch.full((1, OUTER), base), x, pool, records, segments), small)


@pytest.mark.parametrize("columns", [1, 16, 17, 32, 64, 65, 130])
def test_four_bits_come_back(columns: int) -> None:
    steps = torch.randint(-7, 8, (5, columns))
    scales = torch.randint(0, 256, (5, -(-columns // 64))).to(torch.uint8)
    numbers = reference.int4_numbers(steps)
    assert [numbers.shape[1], scales.shape[1]] == list(reference.int4_row(columns))
    values = reference.int4_values(numbers, scales, columns)
    assert torch.equal(values, steps * scales.float().repeat_interleave(64, dim=1)[:, :columns])
    assert not reference.int4_values(numbers, scales, numbers.shape[1] * 2)[:, columns:].any(), "filled up with zeros"


def dense_attention(world: Paged, window: int, softcap: float) -> torch.Tensor:
    """Torch's own attention where it can (no soft cap), else float64 arithmetic."""
    outputs = []
    for request, length in enumerate(world.kv_length.tolist()):
        first, last = world.query_start[request : request + 2].tolist()
        query = world.query[first:last].double().transpose(0, 1)
        group = query.shape[0] // world.keys[request].shape[1]
        keys = world.keys[request].double().transpose(0, 1).repeat_interleave(group, 0)
        values = world.values[request].double().transpose(0, 1).repeat_interleave(group, 0)
        mask = torch.ones(last - first, length, dtype=torch.bool).tril(length - (last - first))
        if window:
            mask &= ~torch.ones_like(mask).tril(length - (last - first) - window)
        if softcap:
            scores = softcap * torch.tanh(query @ keys.mT * world.scale / softcap)
            out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values
        else:
            out = functional.scaled_dot_product_attention(query, keys, values, mask, scale=world.scale)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs).to(world.query.dtype)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (10, 0.0), (0, 3.0), (1, 3.0)])
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10), (torch.bfloat16, 1e-2)], ids=str
)
def test_attention_is_torch_attention(dtype: torch.dtype, atol: float, window: int, softcap: float) -> None:
    world = paged([1, 40, 17, 33], [1, 1, 17, 5], dtype=dtype)
    expected = dense_attention(world, window, softcap)
    result = reference.paged_attention(*world.arguments(), world.scale, window, softcap)
    assert close(result, expected, atol)

    world.block_table[[1, 3]] = world.block_table[[3, 1]]
    assert not close(reference.paged_attention(*world.arguments(), world.scale, window, softcap), expected, atol)


def test_attention_leaves_rows_of_no_request_zero() -> None:
    world = paged([20], [3])
    world.query = torch.cat([world.query, torch.full_like(world.query, torch.nan)])
    assert torch.equal(reference.paged_attention(*world.arguments(), world.scale)[3:], torch.zeros(3, 9, 64))


def test_write_kv_fills_the_named_slots_only() -> None:
    pools = torch.zeros(5, 2, 4, 3, 8, dtype=torch.bfloat16)  # pages, K and V, positions, heads, dim
    key, value = torch.randn(2, 3, 3, 8)
    reference.write_kv(key, value, pools[:, 0], pools[:, 1], torch.tensor([4, 19, 0]))
    for kind, tokens in enumerate((key, value)):
        assert torch.equal(pools[[1, 4, 0], kind, [0, 3, 0]], tokens.bfloat16())
    assert pools.count_nonzero() == 2 * key.numel()
