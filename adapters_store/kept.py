"""Tensors that are dear to make and asked for again: decompositions of the base's weights."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

Tensors = tuple[torch.Tensor, ...]


class Kept:
    """At most `limit` bytes, the longest unasked leaving first. Thread-safe; who gets tensors must not change them."""

    def __init__(self, limit: int = 256 << 20) -> None:
        self._limit = limit
        self._bytes = 0
        self._found: OrderedDict[Hashable, Tensors] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Tensors]) -> Tensors:
        """What `make` gave for this key. Two threads that ask at once may both make it; the first is kept."""
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
        made = make()
        with self._lock:
            if key not in self._found:
                self._found[key] = made
                self._bytes += _size(made)
            while self._bytes > self._limit:
                self._bytes -= _size(self._found.popitem(last=False)[1])
        return made


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)
