"""Weights move as they are: values, ties, and what looks at them."""

import ctypes
import mmap
import sys

import pytest
import torch
from torch import nn

from server.model.memory import MemoryAhead, lazy_bytes, move_to_huge_pages


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 40)
        self.head = nn.Linear(40, 300, bias=False)
        self.head.weight = self.embedding.weight
        self.middle = nn.Linear(40, 70, dtype=torch.bfloat16)
        self.register_buffer("packed", torch.randint(0, 255, (90, 100), dtype=torch.uint8))
        self.register_buffer("turned", torch.randn(60, 80).T)
        self.register_buffer("small", torch.randn(5))


def test_everything_large_lies_in_one_region_with_its_values() -> None:
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    move_to_huge_pages(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    moved = {name for name in before if after[name].data_ptr() != places[name]}
    assert moved == {"embedding.weight", "head.weight", "middle.weight", "packed"}
    assert model.head.weight is model.embedding.weight
    assert len({after[name].untyped_storage().data_ptr() for name in moved}) == 1
    assert all(after[name].data_ptr() % 64 == 0 for name in moved)


def test_views_of_shared_memory_are_left_alone() -> None:
    model = nn.Module()
    table = torch.randn(200, 50)
    model.register_buffer("first", table[:100])
    model.register_buffer("second", table[100:])
    move_to_huge_pages(model)
    table.fill_(3)
    assert all(bool((buffer == 3).all()) for buffer in model.buffers())


def test_reserved_memory_is_zero() -> None:
    assert not lazy_bytes(100_000, torch.device("cpu")).any()
    assert len(lazy_bytes(0, torch.device("cpu"))) == 0


def _resident(buffer: torch.Tensor) -> int:
    """Bytes of a buffer that the system has handed out."""
    pages = (ctypes.c_ubyte * -(-buffer.nbytes // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(buffer.data_ptr()), ctypes.c_size_t(buffer.nbytes), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands out memory ahead")
def test_memory_is_taken_up_to_what_is_in_use_and_ahead() -> None:
    buffer = lazy_bytes(64 << 20, torch.device("cpu"))
    buffer[3 << 20] = 7  # written before: nothing of it may be lost
    memory = MemoryAhead(buffer, ahead=8 << 20)
    while memory.take(0):
        assert _resident(buffer) >= memory.taken
    if not memory.taken:
        pytest.skip("this kernel has no MADV_POPULATE_WRITE")
    assert memory.taken == 8 << 20
    assert _resident(buffer) < 32 << 20
    assert memory.take(4 << 20), "more is in use"
    while memory.take(4 << 20):
        pass
    assert memory.taken == 12 << 20
    assert buffer[3 << 20] == 7
    assert int(buffer.count_nonzero()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands out memory ahead")
def test_no_memory_is_taken_behind_the_end() -> None:
    buffer = lazy_bytes(5_000_000, torch.device("cpu"))
    memory = MemoryAhead(buffer, ahead=64 << 20)
    while memory.take(1 << 40):
        pass
    assert memory.taken in {0, 5_000_000}  # 0: a kernel that cannot


def test_memory_that_does_not_begin_with_a_page_is_left_alone() -> None:
    assert not MemoryAhead(torch.zeros(10_000, dtype=torch.uint8)[64 + 1 :]).take(10_000)
