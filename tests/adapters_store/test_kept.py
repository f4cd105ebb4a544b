"""Tensors kept within a bound."""

import torch

from adapters_store.kept import Kept


class Maker:
    """Counts what it made. Every tensor takes 400 bytes."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> tuple[torch.Tensor, ...]:
        self.count += 1
        return (torch.full((100,), float(self.count)),)


def test_what_was_made_is_given_again() -> None:
    kept, make = Kept(), Maker()
    first = kept.get("a", make)
    assert kept.get("a", make)[0] is first[0]
    assert kept.get("b", make)[0] is not first[0]
    assert make.count == 2


def test_the_longest_unasked_leaves_first() -> None:
    kept, make = Kept(limit=1000), Maker()
    for key in ("a", "b", "a", "c"):
        kept.get(key, make)
    assert make.count == 3
    kept.get("a", make)
    assert make.count == 3
    kept.get("b", make)
    assert make.count == 4


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    kept, make = Kept(limit=399), Maker()
    assert float(kept.get("a", make)[0][0]) == 1
    assert float(kept.get("a", make)[0][0]) == 2
