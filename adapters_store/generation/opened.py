"""Generators in memory, for the adapters that are expanded one after another."""

import threading
from collections import OrderedDict
from collections.abc import Callable

from adapters_store.generation.generator import Generator


class OpenedGenerators:
    """By digest, at most `limit` bytes of weights, the one unasked for longest leaving first. Thread-safe."""

    def __init__(self, limit: int = 256 << 20) -> None:
        self._limit = limit
        self._found: OrderedDict[str, Generator] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: str, load: Callable[[], Generator]) -> Generator:
        """What `load` gave for this digest; raises what it raises. Two that ask at once may both load it."""
        with self._lock:
            if digest in self._found:
                self._found.move_to_end(digest)
                return self._found[digest]
        made = load()
        with self._lock:
            self._found[digest] = made
            while sum(4 * each.parameters for each in self._found.values()) > self._limit:
                self._found.popitem(last=False)
        return made
