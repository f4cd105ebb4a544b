"""Packed adapters in host memory: what the device pool evicts comes back from here, without disk, checks or packing."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

from server.engine.packing import Blocks, PackedAdapter

LOOKED_AT = 64  # of the oldest, for one that the device has: a look at all of thousands would hold up the engine


@dataclass(slots=True)
class HostCounters:
    """Counts since the start."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(slots=True)
class _Part:
    """A shared part in memory, once for all its users."""

    blocks: Blocks
    users: int = 0


class HostCache:
    """At most `limit` bytes of adapters, least recently used first out; parts with the same key are held once.

    Thread-safe. Who holds an adapter keeps its memory, whatever leaves the cache. is_resident: whether the device pool
    has an adapter, which then goes before those it has not.
    """

    def __init__(self, limit: int, is_resident: Callable[[str], bool] = lambda digest: False) -> None:
        self.limit = limit
        self.counters = HostCounters()
        self._is_resident = is_resident
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._parts: dict[bytes, _Part] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def digests(self) -> list[str]:
        with self._lock:
            return list(self._adapters)

    @property
    def bytes_used(self) -> int:
        return self._bytes

    def get(self, digest: str) -> PackedAdapter | None:
        """The adapter if it is here, now the most recently used."""
        with self._lock:
            adapter = self._adapters.get(digest)
            if adapter is None:
                self.counters.misses += 1
            else:
                self.counters.hits += 1
                self._adapters.move_to_end(digest)
            return adapter

    def put(self, adapter: PackedAdapter) -> PackedAdapter:
        """Keep an adapter, unless it is larger than all; returns it with those of its parts that are here already."""
        with self._lock:
            kept = {key: self._parts[key].blocks for key in adapter.shared if key in self._parts}
            adapter = replace(adapter, shared={**adapter.shared, **kept})
            if adapter.num_bytes <= self.limit and adapter.digest not in self._adapters:
                self._add(adapter)
                while self._bytes > self.limit:
                    self._remove(self._oldest(adapter.digest))
                    self.counters.evictions += 1
            return adapter

    def drop(self, digest: str) -> None:
        """Forget an adapter."""
        with self._lock:
            if digest in self._adapters:
                self._remove(digest)

    def check_integrity(self) -> None:
        """Assert that the bytes and the users of shared parts are those of the adapters here."""
        users = [key for adapter in self._adapters.values() for key in adapter.shared]
        if {key: users.count(key) for key in users} != {key: part.users for key, part in self._parts.items()}:
            raise AssertionError("the users of shared parts are miscounted")
        own = sum(_bytes(adapter.own) for adapter in self._adapters.values())
        if self._bytes != own + sum(_bytes(part.blocks) for part in self._parts.values()):
            raise AssertionError("the bytes in host memory are miscounted")

    def _oldest(self, newest: str) -> str:
        oldest = islice((digest for digest in self._adapters if digest != newest), LOOKED_AT)
        first = next(oldest)
        return next((digest for digest in (first, *oldest) if self._is_resident(digest)), first)

    def _add(self, adapter: PackedAdapter) -> None:
        self._adapters[adapter.digest] = adapter
        self._bytes += _bytes(adapter.own)
        for key, blocks in adapter.shared.items():
            part = self._parts.setdefault(key, _Part(blocks))
            self._bytes += 0 if part.users else _bytes(blocks)
            part.users += 1

    def _remove(self, digest: str) -> None:
        adapter = self._adapters.pop(digest)
        self._bytes -= _bytes(adapter.own)
        for key in adapter.shared:
            part = self._parts[key]
            part.users -= 1
            if not part.users:
                del self._parts[key]
                self._bytes -= _bytes(part.blocks)


def _bytes(blocks: Blocks) -> int:
    return sum(block.numel() for block in blocks)
