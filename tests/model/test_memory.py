"""Weights move as they are: values, ties, and what looks at them."""

import torch
from torch import nn

from server.model.memory import lazy_bytes, move_to_huge_pages


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
