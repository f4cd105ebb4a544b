"""`attend` is `write_kv` and then `paged_attention`, natively and in the reference."""

import pytest
import torch

from kernels import dispatch
from tests.kernels.support import paged


@pytest.mark.parametrize("native", [True, False])
def test_attend_writes_and_then_reads(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if native and dispatch.load() != "cpu":
        pytest.skip("no C++ kernels")
    monkeypatch.setattr(dispatch, "_cpu_loaded", native)
    world = paged([20, 5], [1, 5], heads=4, kv_heads=2, dim=16, page_size=4)
    query, keys, values, start, length, table = world.arguments()
    key, value = torch.randn(6, 2, 16), torch.randn(6, 2, 16)
    places = [(0, 19), *((1, position) for position in range(5))]
    slots = torch.tensor([int(world.block_table[r, p // 4]) * 4 + p % 4 for r, p in places])
    before = dispatch.paged_attention(*world.arguments(), world.scale, 7, 2.0)
    both = keys.clone(), values.clone()
    dispatch.write_kv(key, value, *both, slots)
    expected = dispatch.paged_attention(query, *both, start, length, table, world.scale, 7, 2.0)

    result = dispatch.attend(query, key, value, keys, values, slots, start, length, table, world.scale, 7, 2.0)

    assert torch.equal(result, expected)
    assert torch.equal(keys.nan_to_num(), both[0].nan_to_num())
    assert torch.equal(values.nan_to_num(), both[1].nan_to_num())
    assert not torch.equal(result, before)
