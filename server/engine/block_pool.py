"""Accounting of the paged KV cache: which block is held by whom, and which holds a known prefix. No tensors."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain, islice

from server.engine.activation import Activation


class BlockPool:
    """Blocks of `block_size` tokens with reference counts, and a cache of full blocks by the prefix they hold.

    A block is held (references > 0), free, or lent to the adapters. A free block may still hold a cached prefix; free
    blocks are handed out least recently used first, those without a prefix before all others. Blocks from
    `shared_from` on may be lent while they are free; the ones below are the KV cache's for ever.
    """

    def __init__(self, num_blocks: int, block_size: int, shared_from: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.shared_from = num_blocks if shared_from is None else shared_from
        self.now = 0  # counts steps; ages of prefixes and of adapters are compared by it
        self.releases = 0  # blocks that have become free, since the start
        self.reach = 0  # blocks up to the last one that was ever allocated
        self._references = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._blank: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cached: OrderedDict[int, int] = OrderedDict()  # free with a prefix -> when it became free
        self._lent: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_lent(self) -> int:
        return len(self._lent)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest cached prefix of `keys`. They are not acquired yet."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """Free blocks that would be left if `blocks` were acquired."""
        return self.num_free - sum(self._references[block] == 0 for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Take a further reference on known blocks (a prefix hit)."""
        for block in blocks:
            if self._references[block] == 0:
                self._take(block)
            self._references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` fresh blocks, or none at all and None if there are not enough."""
        if count > self.num_free:
            return None
        blocks = list(islice(chain(self._blank, self._cached), count))
        for block in blocks:
            self._take(block)
            self._references[block] = 1
            self._forget(block)
        self.reach = max(self.reach, 1 + max(blocks, default=-1))
        return blocks

    def forgets(self, count: int) -> float:
        """When the youngest prefix was used that `allocate(count)` would give up; -1 for none, infinity if it fails."""
        cached = count - len(self._blank)
        if cached <= 0:
            return -1
        return math.inf if cached > len(self._cached) else next(islice(self._cached.values(), cached - 1, None))

    def register(self, block: int, key: bytes) -> None:
        """Remember that a held, full block holds the prefix `key`; the first block to hold it wins."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Give one reference back per block. Tails become free first, so a shared prefix lives longest."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self.releases += 1
                if block in self._key_of:
                    self._cached[block] = self.now
                else:
                    self._blank[block] = None

    def lendable(self, before: float = math.inf) -> list[int]:
        """Shared free blocks in the order in which to lend them: without a prefix from the end, then least recently
        used, if that was earlier than `before`.
        """
        blank = sorted((block for block in self._blank if block >= self.shared_from), reverse=True)
        cached = (block for block, freed in self._cached.items() if block >= self.shared_from and freed < before)
        return [*blank, *cached]

    def lend(self, blocks: Iterable[int]) -> None:
        """Give free, shared blocks to the adapters; their prefixes are gone."""
        for block in blocks:
            self._take(block)
            self._forget(block)
            self._lent.add(block)

    def give_back(self, blocks: Iterable[int]) -> None:
        """Take blocks back from the adapters."""
        for block in blocks:
            self._lent.remove(block)
            self._blank[block] = None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that the references are exactly those of the block tables given, and free + held + lent is all."""
        expected = [0] * self.num_blocks
        for table in tables:
            for block in table:
                expected[block] += 1
        if expected != self._references:
            raise AssertionError(f"KV references are {self._references}, the block tables hold {expected}")
        unheld = [block for block, count in enumerate(expected) if count == 0]
        if unheld != sorted([*self._blank, *self._cached, *self._lent]):
            raise AssertionError(f"free and lent blocks are not the unreferenced blocks {unheld}")
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise AssertionError("the prefix cache and its inverse differ")
        if not self._cached.keys() <= self._key_of.keys() or not self._key_of.keys().isdisjoint(self._blank):
            raise AssertionError("blocks with and without a prefix are mixed")

    def _take(self, block: int) -> None:
        """Out of the free blocks."""
        if block in self._cached:
            del self._cached[block]
        else:
            del self._blank[block]

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]


class PrefixKeys:
    """Keys of a sequence's full blocks, each the SHA-256 of a tagged tuple.

    The tuple is (base fingerprint, adapters with weights that act before the block's end and from where, tenant salt,
    tokens up to the block's end), so no block is ever shared across bases, tenants, or adapters that have a part in
    it; a name plays no part. What lies before the first token on which an adapter acts is the base's, and so shared.
    """

    def __init__(self, fingerprint: str, adapters: tuple[Activation, ...], salt: str, block_size: int) -> None:
        self._block_size = block_size
        self._starts = [(a.start, repr((a.adapter.digest, a.adapter.weight, a.start))) for a in adapters]
        identity = repr(("polyrank-kv-2", fingerprint, salt, block_size))
        self._keys = [hashlib.sha256(identity.encode()).digest()]

    def upto(self, tokens: Sequence[int], num_tokens: int) -> list[bytes]:
        """Keys of the blocks that the first `num_tokens` tokens fill; computed once each."""
        size = self._block_size
        count = num_tokens // size
        while len(self._keys) <= count:
            index = len(self._keys) - 1
            acting = [told for start, told in self._starts if start < (index + 1) * size]
            block = repr((acting, tokens[index * size : (index + 1) * size]))
            self._keys.append(hashlib.sha256(self._keys[-1] + block.encode()).digest())
        return self._keys[1 : count + 1]
