"""The adapters' first product beside the base product: the same sums, and nothing left running."""

from dataclasses import replace

import pytest
import torch

from kernels import dispatch, reference
from kernels.triton import lowrank as gpu
from kernels.triton.chunks import chunks_of
from tests.kernels.support import Group, close, lowrank_adapter, pack, segments_of, swapped


def test_the_side_stream_is_waited_for_whatever_becomes_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes is freed afterwards, so a failed product must not leave it running."""
    calls: list[str] = []
    monkeypatch.setattr(dispatch, "_on_gpu", lambda y, x: True)
    monkeypatch.setattr(gpu, "beside", lambda *_: True)
    monkeypatch.setattr(gpu, "shrink_beside", lambda *_: calls.append("shrink"))
    monkeypatch.setattr(gpu, "join", lambda _: calls.append("join"))
    monkeypatch.setattr(gpu, "expand_after", lambda *_: calls.append("expand"))
    pool, records = pack([lowrank_adapter(2, 8, 6, torch.float32)])
    x, segments = torch.randn(3, 8), segments_of(Group(0, [1]))
    segments = replace(segments, chunks=chunks_of(segments, "cpu"))

    def product() -> list[torch.Tensor]:
        calls.append("product")
        return [torch.zeros(3, 6)]

    def fails() -> list[torch.Tensor]:
        raise RuntimeError("out of memory")

    [y] = dispatch.lowrank_around(product, 6, x, pool, [records], segments)
    assert y.shape == (3, 6)
    assert calls == ["shrink", "product", "join", "expand"]
    calls.clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        dispatch.lowrank_around(fails, 6, x, pool, [records], segments)
    assert calls == ["shrink", "join"]


def test_around_a_product_the_adapters_are_added_as_after_it() -> None:
    pool, records = pack([lowrank_adapter(r, 8, 6, torch.float32) for r in (2, 5)])
    x, base, segments = torch.randn(4, 8), torch.randn(4, 6), segments_of(Group(0, [1]), Group(1, [2, 3]))
    expected = reference.lowrank(base.clone(), x, pool, records, segments)
    [y] = dispatch.lowrank_around(lambda: [base.clone()], 6, x, pool, [records], segments)
    assert close(y, expected, 1e-5)
    assert not close(y, reference.lowrank(base.clone(), x, pool, records, swapped(segments, 0, 1)), 1e-3)
