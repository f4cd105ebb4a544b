"""The adapters' first product beside the base product: the same sums, and nothing left running."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kernels import dispatch, reference
from kernels.segments import Limits
from kernels.triton import lowrank as gpu
from kernels.triton.chunks import chunks_of
from tests.kernels.support import Group, close, lowrank_adapter, pack, segments_of, swapped
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.support import GROUPS, ROWS, on_device, packed


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where there is no GPU, streams that do their work at once; what was waited for."""
    waits: list[str] = []
    if DEVICE == "cpu":

        def stream(name: str) -> SimpleNamespace:
            return SimpleNamespace(wait_stream=lambda other: waits.append(f"{name} for {other.name}"), name=name)

        monkeypatch.setattr(gpu, "_side_stream", lambda _: stream("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream("main"))
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(dispatch, "_on_gpu", lambda y, x: True)
    return waits


def test_the_side_stream_is_waited_for_whatever_becomes_of_the_product(
    streams: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it writes is freed afterwards, so a failed product must not leave it running."""
    if DEVICE != "cpu":
        pytest.skip("on a GPU nothing tells of the waiting")
    monkeypatch.setattr(gpu, "beside", lambda *_: True)
    monkeypatch.setattr(gpu, "shrink", lambda *_: streams.append("shrink"))
    monkeypatch.setattr(gpu, "_summed", lambda *_: None)
    monkeypatch.setattr(gpu, "_expand", lambda *_: streams.append("expand"))
    pool, records = pack([lowrank_adapter(2, 8, 6, torch.float32)])
    x, segments = torch.randn(3, 8), segments_of(Group(0, [1]))
    segments = replace(segments, chunks=chunks_of(segments, "cpu"))

    def product() -> list[torch.Tensor]:
        streams.append("product")
        return [torch.zeros(3, 6)]

    def fails() -> list[torch.Tensor]:
        raise RuntimeError("out of memory")

    [y] = dispatch.lowrank_around(product, 6, x, pool, [records], segments)
    assert y.shape == (3, 6)
    assert streams == ["side for main", "shrink", "product", "main for side", "expand"]
    streams.clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        dispatch.lowrank_around(fails, 6, x, pool, [records], segments)
    assert streams == ["side for main", "shrink", "main for side"]
    streams.clear()
    monkeypatch.setattr(gpu, "_summed", lambda *_: fails())
    with pytest.raises(RuntimeError, match="out of memory"):
        dispatch.lowrank_around(product, 6, x, pool, [records], segments)
    assert streams == ["side for main", "shrink", "main for side"]


def test_around_a_product_the_adapters_are_added_as_after_it() -> None:
    pool, records = pack([lowrank_adapter(r, 8, 6, torch.float32) for r in (2, 5)])
    x, base, segments = torch.randn(4, 8), torch.randn(4, 6), segments_of(Group(0, [1]), Group(1, [2, 3]))
    expected = reference.lowrank(base.clone(), x, pool, records, segments)
    [y] = dispatch.lowrank_around(lambda: [base.clone()], 6, x, pool, [records], segments)
    assert close(y, expected, 1e-5)
    assert not close(y, reference.lowrank(base.clone(), x, pool, records, swapped(segments, 0, 1)), 1e-3)


@pytest.mark.parametrize("core", [False, True], ids=["plain", "cores"])
@pytest.mark.parametrize("inner", [70, 1100], ids=["one part", "parts"])
def test_beside_has_the_bits_of_one_after_the_other(inner: int, core: bool, streams: list[str]) -> None:
    pool, records = packed([lowrank_adapter(r, inner, 45, torch.bfloat16, core=core) for r in (1, 3, 17, 64, 7, 8)])
    y, x = on_device(torch.randn(ROWS, 45).bfloat16(), torch.randn(ROWS, inner).bfloat16())
    segments = segments_of(*GROUPS)
    chunks = chunks_of(segments, DEVICE, Limits(64, 0b10, core))
    expected = y.clone()
    gpu.lowrank_group([expected], x, pool, [records], chunks, fuse=False)
    for outer in (45, 2**23):  # one kernel for both products, or two
        [found] = dispatch.lowrank_around(
            lambda: [y.clone()], outer, x, pool, [records], replace(segments, chunks=chunks)
        )
        assert torch.equal(found, expected)
    assert not torch.equal(expected, y)
    if DEVICE == "cpu":
        assert streams == ["side for main", "main for side"] * (2 if core else 1), "cores have no kernel for both"
