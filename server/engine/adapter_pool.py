"""Accounting of adapters on the device: which are resident, who uses them, and who makes room. No tensors."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from server.engine.block_pool import BlockPool
from server.engine.page_allocator import PageAllocator
from server.engine.status import Residency

NOTHING_SHARED: Mapping[bytes, Sequence[int]] = {}


@dataclass(frozen=True, slots=True)
class Piece:
    """Where blocks of bytes lie: the byte offset of each, and the pages that hold them."""

    offsets: tuple[int, ...]
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an adapter lies: its slot in the record tables, the byte offset of each block, its own pages.

    The offsets of its own blocks come first, then those of its shared parts, in the order of `shared`: their keys.
    fresh: those among them that nobody had brought before.
    """

    slot: int
    offsets: tuple[int, ...]
    pages: tuple[int, ...]
    shared: tuple[bytes, ...] = ()
    fresh: frozenset[bytes] = frozenset()


@dataclass(slots=True)
class AdapterCounters:
    """Counts since the start."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    failures: int = 0


@dataclass(slots=True)
class AdapterPool:
    """Resident adapters in least recently used order, with reference counts and pins.

    Life of an adapter: absent, wanted (`want`), loading (`take_wanted`), resident (`place`), and absent again when
    it is evicted, which happens only to make room, only without references and never while pinned. It lies in pages
    of its own, borrowed from the KV cache (`blocks`) where the adapters' own pages are full; parts with the same key
    lie in one place for all adapters that have them.
    """

    allocator: PageAllocator
    num_slots: int
    blocks: BlockPool = field(default_factory=lambda: BlockPool(0, 1))
    counters: AdapterCounters = field(default_factory=AdapterCounters)
    changes: int = 0  # counts what may have made room
    _resident: OrderedDict[str, Placement] = field(default_factory=OrderedDict)
    _used: dict[str, int] = field(default_factory=dict)  # when, in the time of `blocks.now`
    _shared: dict[bytes, Piece] = field(default_factory=dict)
    _users: Counter[bytes] = field(default_factory=Counter)  # of each shared part, resident adapters
    _arriving: set[str] = field(default_factory=set)  # placed, but their bytes are still being copied
    _references: dict[str, int] = field(default_factory=dict)
    _pinned: set[str] = field(default_factory=set)
    _wanted: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _loading: set[str] = field(default_factory=set)
    _free_slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free_slots = list(range(self.num_slots))

    def residency(self, digest: str) -> Residency:
        if digest in self._loading or digest in self._wanted or digest in self._arriving:
            return Residency.LOADING
        return Residency.RESIDENT if digest in self._resident else Residency.ABSENT

    def slot(self, digest: str) -> int:
        return self._resident[digest].slot

    def resident(self) -> list[str]:
        return list(self._resident)

    @property
    def num_resident(self) -> int:
        return len(self._resident)

    @property
    def num_pending(self) -> int:
        """Adapters asked for, loading or being copied."""
        return len(self._wanted) + len(self._loading) + len(self._arriving)

    @property
    def bytes_used(self) -> int:
        pages = self.allocator.num_pages - self.allocator.num_free + self.blocks.num_lent
        return pages * self.allocator.page_bytes

    @property
    def device_bytes(self) -> int:
        """Of KV cache and adapters together."""
        return (self.blocks.num_blocks + self.allocator.num_pages) * self.allocator.page_bytes

    def acquire(self, digests: Iterable[str]) -> bool:
        """Take a reference on each adapter if all are resident; else take none and ask for the missing ones."""
        needed = set(digests)
        missing = [digest for digest in needed if digest not in self._resident or digest in self._arriving]
        for digest in missing:
            self.want(digest)
        if missing:
            return False
        for digest in needed:
            self._references[digest] = self._references.get(digest, 0) + 1
            self._touch(digest)
        return True

    def all_resident(self, digests: Iterable[str]) -> bool:
        """Whether `acquire` would give them."""
        return all(digest in self._resident and digest not in self._arriving for digest in digests)

    def release(self, digests: Iterable[str]) -> None:
        for digest in set(digests):
            self._references[digest] -= 1
            self._touch(digest)
            if not self._references[digest]:
                del self._references[digest]
                self.changes += 1

    def want(self, digest: str) -> None:
        """Ask for an adapter; nothing happens if it is resident or already asked for."""
        if self.residency(digest) is Residency.ABSENT:
            self._wanted[digest] = None
            self.counters.misses += 1

    def take_wanted(self, at_most: int, urgent: Set[str] = frozenset()) -> list[str]:
        """Adapters whose load may begin now, oldest wish first, so that `at_most` are loading together.

        Those in `urgent` (what the head of the queue waits for) begin in any case, so that loads which find no room
        can never keep it waiting for ever.
        """
        digests = [digest for digest in self._wanted if digest in urgent]
        others = [digest for digest in self._wanted if digest not in urgent]
        digests += others[: max(0, at_most - len(self._loading) - len(digests))]
        for digest in digests:
            del self._wanted[digest]
        self._loading.update(digests)
        return digests

    def next_wanted(self, at_most: int) -> list[str]:
        """The oldest wishes whose load has not begun."""
        return [digest for digest, _ in zip(self._wanted, range(at_most), strict=False)]

    def place(
        self,
        digest: str,
        sizes: Sequence[int],
        keep: Set[str] = frozenset(),
        shared: Mapping[bytes, Sequence[int]] = NOTHING_SHARED,
    ) -> Placement | None:
        """Find room for a loaded adapter, evicting unused ones, oldest first; None if the others leave too little.

        Nothing is evicted unless that makes the room, and nothing in `keep` (what the head of the queue waits for).
        Prefixes in the KV cache that were used before an adapter go before it. sizes: bytes of its own blocks; shared:
        of those of its shared parts, by key.
        """
        victims = self._idle(keep)
        # The fewest of the oldest, for with more of them evicted there is never less room. Mostly none or one will do.
        found, low, high = self._fit(sizes, shared, victims, 0), 0, 0
        while found is None:
            if high == len(victims):
                return None
            low, high = high + 1, min(2 * high + 1, len(victims))
            found = self._fit(sizes, shared, victims, high)
        while low < high:
            middle = (low + high) // 2
            fewer = self._fit(sizes, shared, victims, middle)
            if fewer is None:
                low = middle + 1
            else:
                found, high = fewer, middle
        own, fresh = found
        self._make_way([*own.pages, *(page for piece in fresh.values() for page in piece.pages)], victims[:high])
        fresh = {key: piece for key, piece in fresh.items() if key not in self._shared}
        for piece in (own, *fresh.values()):
            self._take(piece.pages)
        self._shared.update(fresh)
        offsets = own.offsets + tuple(offset for key in shared for offset in self._shared[key].offsets)
        placement = Placement(self._free_slots.pop(), offsets, own.pages, tuple(shared), frozenset(fresh))
        self.counters.loads += 1
        self._loading.discard(digest)
        self._resident[digest] = placement
        self._users.update(shared.keys())
        self._used[digest] = self.blocks.now
        return placement

    def can_ever_hold(self, num_bytes: int) -> bool:
        """Whether an adapter of that many bytes would fit if there were nothing else."""
        borrowable = self.blocks.num_blocks - self.blocks.shared_from
        return num_bytes <= (self.allocator.num_pages + borrowable) * self.allocator.page_bytes

    def await_bytes(self, digest: str) -> None:
        """A placed adapter may not be used until `arrived`: its bytes are on their way."""
        self._arriving.add(digest)

    def arrived(self, digest: str) -> None:
        self._arriving.remove(digest)
        self.changes += 1

    def give_blocks(self, count: int, keep: Set[str] = frozenset()) -> None:
        """Evict unused adapters that lie in borrowed pages, oldest first, for `count` blocks of the KV cache.

        As long as they would not be free, or only at the price of prefixes used later than the adapter.
        """
        if not self.blocks.num_lent or self.blocks.forgets(count) < 0:
            return
        idle = self._idle(keep)
        returnable = set(self._borrowed(self._pages(idle)))
        lenders = [digest for digest in idle if not returnable.isdisjoint(self._lies_in(digest))]
        while lenders and self.blocks.forgets(count) > self._used[lenders[0]]:
            self._evict(lenders.pop(0))

    def num_returnable(self, keep: Set[str] = frozenset()) -> int:
        """Blocks that the KV cache would get back if all unused adapters were evicted."""
        return len(self._borrowed(self._pages(self._idle(keep)))) if self.blocks.num_lent else 0

    def fail(self, digest: str) -> None:
        """A load failed: forget the wish, so that a later request may try again."""
        self._loading.discard(digest)
        self.counters.failures += 1

    def expects(self, digest: str) -> bool:
        """Whether a load of this adapter has begun and is still wanted."""
        return digest in self._loading

    def discard(self, digest: str) -> None:
        """Forget an adapter: a wish, a load that has begun, and its place unless it is in use or pinned."""
        self._wanted.pop(digest, None)
        self._loading.discard(digest)
        if digest in self._idle(frozenset()):
            self._evict(digest)

    def pin(self, digest: str) -> None:
        """Keep an adapter resident; it is loaded if it is not there yet."""
        self._pinned.add(digest)
        self.want(digest)

    def unpin(self, digest: str) -> None:
        self._pinned.discard(digest)
        self.changes += 1

    def pinned(self, digest: str) -> bool:
        return digest in self._pinned

    def check_integrity(self, users: Iterable[Sequence[str]]) -> None:
        """Assert that references are those of the running sequences and that pages and slots add up."""
        expected: dict[str, int] = {}
        for digests in users:
            for digest in set(digests):
                expected[digest] = expected.get(digest, 0) + 1
        if expected != self._references:
            raise AssertionError(f"adapter references are {self._references}, the running sequences hold {expected}")
        if not expected.keys() <= self._resident.keys() - self._arriving:
            raise AssertionError("a running sequence uses an adapter that is not resident")
        parts = Counter(key for placement in self._resident.values() for key in placement.shared)
        if parts.keys() != self._shared.keys() or +self._users != parts:
            raise AssertionError("shared parts are not those of the resident adapters")
        pages = [page for placement in self._resident.values() for page in placement.pages]
        pages += [page for piece in self._shared.values() for page in piece.pages]
        num_taken = self.allocator.num_pages - self.allocator.num_free + self.blocks.num_lent
        if len(set(pages)) != len(pages) or len(pages) != num_taken:
            raise AssertionError("adapter pages overlap or leak")
        slots = [placement.slot for placement in self._resident.values()] + self._free_slots
        if sorted(slots) != list(range(self.num_slots)):
            raise AssertionError("adapter slots overlap or leak")

    def _touch(self, digest: str) -> None:
        self._resident.move_to_end(digest)
        self._used[digest] = self.blocks.now

    def _idle(self, keep: Set[str]) -> list[str]:
        """What may be evicted, least recently used first."""
        spared = self._references.keys() | self._pinned | self._arriving | keep
        return [digest for digest in self._resident if digest not in spared]

    def _fit(
        self, sizes: Sequence[int], shared: Mapping[bytes, Sequence[int]], victims: Sequence[str], count: int
    ) -> tuple[Piece, dict[bytes, Piece]] | None:
        """Places for an adapter's own blocks and for the parts not there yet, were the first `count` victims gone."""
        gone = victims[:count]
        if not self._free_slots and not gone:
            return None
        before = {"before": self._used[victims[count]]} if count < len(victims) else {}
        more = [*self._pages(gone), *self.blocks.lendable(**before)]
        staying = set(self._shared) - self._parts_only_of(gone)
        found: list[Piece] = []
        missing = [key for key in shared if key not in staying]
        parts = [sizes, *(shared[key] for key in missing)]
        if sum(map(sum, parts)) > (self.allocator.num_free + len(more)) * self.allocator.page_bytes:
            return None  # told without trying
        for wanted in parts:
            taken = {page for piece in found for page in piece.pages}
            placed = self.allocator.fit(wanted, more, taken)
            if placed is None:
                return None
            found.append(Piece(tuple(placed[0]), tuple(placed[1])))
        return found[0], dict(zip(missing, found[1:], strict=True))

    def _make_way(self, pages: Sequence[int], victims: Sequence[str]) -> None:
        """Evict those victims that lie in these pages, and one for its slot if there is none."""
        wanted = set(pages)
        for victim in victims:
            if not wanted.isdisjoint(self._lies_in(victim)):
                self._evict(victim)
        if not self._free_slots:
            self._evict(next(victim for victim in victims if victim in self._resident))

    def _pages(self, digests: Sequence[str]) -> list[int]:
        """Pages that would be free if these adapters were evicted."""
        own = [page for digest in digests for page in self._resident[digest].pages]
        return own + [page for key in self._parts_only_of(digests) for page in self._shared[key].pages]

    def _lies_in(self, digest: str) -> list[int]:
        """Pages of an adapter, those of its shared parts too."""
        placement = self._resident[digest]
        return [*placement.pages, *(page for key in placement.shared for page in self._shared[key].pages)]

    def _parts_only_of(self, digests: Sequence[str]) -> set[bytes]:
        own = Counter(key for digest in digests for key in self._resident[digest].shared)
        return {key for key, count in own.items() if count == self._users[key]}

    def _evict(self, digest: str) -> None:
        parts = self._parts_only_of([digest])
        placement = self._resident.pop(digest)
        pages = [*placement.pages, *(page for key in parts for page in self._shared.pop(key).pages)]
        self._users.subtract(placement.shared)
        self.changes += 1
        del self._used[digest]
        self.allocator.release([page for page in pages if page >= self.allocator.first])
        self.blocks.give_back(self._borrowed(pages))
        self._free_slots.append(placement.slot)
        self.counters.evictions += 1

    def _take(self, pages: Sequence[int]) -> None:
        self.allocator.take(page for page in pages if page >= self.allocator.first)
        self.blocks.lend(self._borrowed(pages))

    def _borrowed(self, pages: Iterable[int]) -> list[int]:
        return [page for page in pages if page < self.allocator.first]
