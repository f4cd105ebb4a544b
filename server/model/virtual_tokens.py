"""Virtual tokens: rows of a step whose embeddings, or keys and values, are an adapter's and not computed."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ContextPlace:
    """Where an adapter's virtual tokens lie, by offsets in bytes.

    One offset: of embeddings, [num_tokens, hidden]. Two for each layer: of its keys and its values, [num_tokens,
    kv_heads, dim] each. All are of `dtype`.
    """

    num_tokens: int
    dtype: torch.dtype
    offsets: tuple[int, ...]

    @property
    def is_prefix(self) -> bool:
        """Whether it holds keys and values."""
        return len(self.offsets) > 1


@dataclass(frozen=True, slots=True)
class VirtualRows:
    """Rows `first` to `first + count` of the flat batch: they stand for virtual tokens from `start` on."""

    place: ContextPlace
    first: int
    start: int
    count: int

    def exchange(self, states: torch.Tensor, pool: torch.Tensor, part: int) -> None:
        """Overwrite these rows of `states` [T, ...] with those of the adapter, whose bytes lie in `pool`.

        part: which of the place's offsets; a row of it has as many numbers as one of `states`.
        """
        shape = states.shape[1:]
        row_bytes = math.prod(shape) * self.place.dtype.itemsize
        begin = self.place.offsets[part] + self.start * row_bytes
        rows = pool[begin : begin + self.count * row_bytes].view(self.place.dtype)
        states[self.first : self.first + self.count] = rows.view(self.count, *shape)
