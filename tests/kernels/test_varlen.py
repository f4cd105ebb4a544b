"""Which attention goes to torch's `varlen_attn`, and what it is asked for."""

from typing import Any

import pytest
import torch
from torch.nn import attention as torch_attention
from torch.nn.attention import varlen as torch_varlen

from kernels import dispatch, reference, varlen
from tests.kernels.support import close, paged


@pytest.mark.parametrize(
    ("dtype", "pool", "dim", "page", "softcap", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, 64, 256, 0.0, True),
        (torch.float16, torch.float16, 256, 512, 0.0, True),
        (torch.bfloat16, torch.bfloat16, 64, 16, 0.0, False),
        (torch.bfloat16, torch.bfloat16, 64, 256, 30.0, False),
        (torch.float32, torch.float32, 64, 256, 0.0, False),
        (torch.bfloat16, torch.float16, 64, 256, 0.0, False),
        (torch.bfloat16, torch.bfloat16, 60, 256, 0.0, False),
        (torch.bfloat16, torch.bfloat16, 264, 256, 0.0, False),
    ],
)
def test_what_varlen_attention_takes(
    dtype: torch.dtype, pool: torch.dtype, dim: int, page: int, softcap: float, expected: bool
) -> None:
    query, keys = torch.empty(3, 4, dim, dtype=dtype), torch.empty(2, page, 2, dim, dtype=pool)
    assert varlen.takes(query, keys, softcap) is expected


@pytest.mark.parametrize(("active", "expected"), [("FA3", True), ("FA4", True), ("FA2", False), (None, False)])
def test_small_pages_need_a_newer_flash_attention(
    active: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_attention, "current_flash_attention_impl", lambda: active)
    query, keys = torch.empty(3, 4, 64, dtype=torch.bfloat16), torch.empty(2, 16, 2, 64, dtype=torch.bfloat16)
    assert varlen.takes(query, keys, 0.0) is expected


@pytest.mark.parametrize(("window", "asked"), [(0, (-1, 0)), (5, (4, 0))])
def test_what_it_is_asked_for(window: int, asked: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(torch_varlen, "varlen_attn_out", lambda *args, **kwargs: calls.append((args, kwargs)))
    world = paged([20, 40], [2, 1], dtype=torch.bfloat16, pool_dtype=torch.bfloat16)

    out = varlen.attention(*world.arguments(), world.scale, window)

    (positional, named) = calls[0]
    assert positional[0] is out
    assert torch.equal(out, torch.zeros_like(world.query)), "rows of no request stay zero"
    assert positional[5:] == (None, 3, 48)
    assert named["window_size"] == asked, "torch does not count the query's own key"
    assert named["enable_gqa"] is True
    assert named["num_splits"] == 1
    assert named["seqused_k"] is world.kv_length


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [0, 7])
def test_matches_reference_on_a_gpu(window: int) -> None:
    world = paged([300, 17], [3, 1], page_size=256, dtype=torch.bfloat16, pool_dtype=torch.bfloat16)
    expected = reference.paged_attention(*world.arguments(), world.scale, window)
    query, key_pool, value_pool, start, length, table = (tensor.cuda() for tensor in world.arguments())
    assert varlen.takes(query, key_pool, 0.0)
    result = dispatch.paged_attention(query, key_pool, value_pool, start, length, table, world.scale, window)
    assert close(result.cpu(), expected, 1e-2)
