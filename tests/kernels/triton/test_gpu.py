"""What only a GPU can show: the door picks Triton, and a captured graph follows the chunk table."""

import pytest
import torch

from kernels import dispatch, reference
from kernels.triton import attention, lowrank
from kernels.triton.chunks import ChunkTable
from tests.kernels.support import Group, close, lowrank_adapter, pack, paged, segments_of
from tests.kernels.triton.support import GROUPS, ROWS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_the_door_picks_triton() -> None:
    pool, records = pack([lowrank_adapter(r, 70, 45, torch.bfloat16) for r in (1, 3, 17, 64, 7, 8)])
    y, x, segments = torch.randn(ROWS, 45), torch.randn(ROWS, 70), segments_of(*GROUPS)
    expected = reference.lowrank(y.clone(), x, pool, records, segments)
    placed = dispatch.place(segments, "cuda")
    assert placed.chunks is not None
    result = dispatch.lowrank(y.cuda(), x.cuda(), pool.cuda(), records.cuda(), placed)
    assert close(result.cpu(), expected, 1e-5)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_captured_graph_serves_other_steps(fuse: bool) -> None:
    pool, records = (t.cuda() for t in pack([lowrank_adapter(r, 70, 45, torch.bfloat16) for r in (1, 3, 17, 64, 7, 8)]))
    y, x = torch.randn(ROWS, 45, device="cuda"), torch.randn(ROWS, 70, device="cuda")
    table, result = ChunkTable(64, 32, "cuda"), y.clone()
    chunks = table.fill(segments_of(*GROUPS))
    lowrank.lowrank_group([result], x, pool, [records], chunks, fuse=fuse)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lowrank.lowrank_group([result], x, pool, [records], chunks, fuse=fuse)
    other = segments_of(Group(3, range(20)), Group(0, [21]))
    table.fill(other)
    result.copy_(y)
    graph.replay()
    expected = reference.lowrank(y.clone(), x, pool, records, dispatch.place(other, "cuda"))
    assert close(result, expected, 1e-5)


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_matches_reference_with_and_without_split(dtype: torch.dtype, window: int) -> None:
    world = paged([300, 17, 1500], [3, 1, 40], dtype=dtype, pool_dtype=dtype)
    expected = reference.paged_attention(*world.arguments(), world.scale, window)
    query, key_pool, value_pool, *metadata = (tensor.cuda() for tensor in world.arguments())
    start, length, table = metadata
    result = dispatch.paged_attention(query, key_pool, value_pool, start, length, table, world.scale, window)
    assert close(result.cpu(), expected, 2**-8 if dtype == torch.bfloat16 else 1e-5)
    for split in (False, True):
        other = attention.attention(query, key_pool, value_pool, start, length, table, world.scale, window, split=split)
        assert torch.equal(other, result)
