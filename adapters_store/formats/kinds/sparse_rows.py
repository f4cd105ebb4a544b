"""Entries of a matrix as the compressed rows of `Sparse`."""

import torch

from adapters_store.forms import Sparse


def compressed(place: torch.Tensor, value: torch.Tensor, rows: int, columns: int) -> Sparse:
    """place: int64 [n], `row * columns + column` of each; value: float32 [n]. Values of one place add up."""
    place, where = torch.unique(place, return_inverse=True)
    summed = torch.zeros(len(place)).index_add_(0, where, value)
    counts = torch.bincount(place // columns, minlength=rows)
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return Sparse(start, (place % columns).int(), summed)
