"""Accounting of adapters on the device: which are resident, who uses them, and who makes room. No tensors."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

from server.engine.page_allocator import PageAllocator
from server.engine.status import Residency


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an adapter lies: its slot in the record tables, the byte offset of each block, its pages."""

    slot: int
    offsets: tuple[int, ...]
    pages: tuple[int, ...]


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
    it is evicted, which happens only to make room, only without references and never while pinned.
    """

    allocator: PageAllocator
    num_slots: int
    counters: AdapterCounters = field(default_factory=AdapterCounters)
    _resident: OrderedDict[str, Placement] = field(default_factory=OrderedDict)
    _references: dict[str, int] = field(default_factory=dict)
    _pinned: set[str] = field(default_factory=set)
    _wanted: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _loading: set[str] = field(default_factory=set)
    _free_slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free_slots = list(range(self.num_slots))

    def residency(self, digest: str) -> Residency:
        if digest in self._resident:
            return Residency.RESIDENT
        return Residency.LOADING if digest in self._loading or digest in self._wanted else Residency.ABSENT

    def slot(self, digest: str) -> int:
        return self._resident[digest].slot

    @property
    def num_resident(self) -> int:
        return len(self._resident)

    @property
    def num_pending(self) -> int:
        """Adapters asked for or loading."""
        return len(self._wanted) + len(self._loading)

    @property
    def bytes_used(self) -> int:
        return (self.allocator.num_pages - self.allocator.num_free) * self.allocator.page_bytes

    def acquire(self, digests: Iterable[str]) -> bool:
        """Take a reference on each adapter if all are resident; else take none and ask for the missing ones."""
        needed = set(digests)
        missing = needed - self._resident.keys()
        for digest in missing:
            self.want(digest)
        if missing:
            return False
        for digest in needed:
            self._references[digest] = self._references.get(digest, 0) + 1
            self._resident.move_to_end(digest)
        return True

    def release(self, digests: Iterable[str]) -> None:
        for digest in set(digests):
            self._references[digest] -= 1
            if not self._references[digest]:
                del self._references[digest]

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

    def place(self, digest: str, sizes: Sequence[int], keep: Set[str] = frozenset()) -> Placement | None:
        """Find room for a loaded adapter, evicting unused ones, oldest first; None if the others leave too little.

        Nothing is evicted unless that makes the room, and nothing in `keep` (what the head of the queue waits for).
        """
        spared = self._references.keys() | self._pinned | keep
        victims = [resident for resident in self._resident if resident not in spared]
        found = self._place(sizes)
        removed: list[tuple[str, Placement]] = []
        while found is None and victims:
            victim = victims.pop(0)
            removed.append((victim, self._resident[victim]))
            self._free(self._resident[victim])
            found = self._place(sizes)
        if found is None:
            for victim, placement in removed:
                self._resume(placement)
                self._resident[victim] = placement
            return None
        for victim, _ in removed:
            del self._resident[victim]
        self.counters.evictions += len(removed)
        self.counters.loads += 1
        self._loading.discard(digest)
        self._resident[digest] = found
        return found

    def fail(self, digest: str) -> None:
        """A load failed: forget the wish, so that a later request may try again."""
        self._loading.discard(digest)
        self.counters.failures += 1

    def pin(self, digest: str) -> None:
        """Keep an adapter resident; it is loaded if it is not there yet."""
        self._pinned.add(digest)
        self.want(digest)

    def unpin(self, digest: str) -> None:
        self._pinned.discard(digest)

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
        if not expected.keys() <= self._resident.keys():
            raise AssertionError("a running sequence uses an adapter that is not resident")
        pages = [page for placement in self._resident.values() for page in placement.pages]
        if len(set(pages)) != len(pages) or len(pages) + self.allocator.num_free != self.allocator.num_pages:
            raise AssertionError("adapter pages overlap or leak")
        slots = [placement.slot for placement in self._resident.values()] + self._free_slots
        if sorted(slots) != list(range(self.num_slots)):
            raise AssertionError("adapter slots overlap or leak")

    def _place(self, sizes: Sequence[int]) -> Placement | None:
        if not self._free_slots:
            return None
        placed = self.allocator.allocate(sizes)
        if placed is None:
            return None
        return Placement(self._free_slots.pop(), tuple(placed[0]), tuple(placed[1]))

    def _free(self, placement: Placement) -> None:
        self.allocator.release(placement.pages)
        self._free_slots.append(placement.slot)

    def _resume(self, placement: Placement) -> None:
        """Undo `_free`: nobody has taken the pages or the slot in between."""
        self.allocator.reclaim(placement.pages)
        self._free_slots.remove(placement.slot)
