"""Whose waiting sequence is admitted next: fair between tenants, then between a tenant's adapters, then by arrival.

Virtual Token Counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024), on two levels. A tenant,
and each set of adapters of a tenant (its lane), has a counter of what was computed for it, and the one with the least
goes first. Who begins to wait is lifted to the least that waits, so that idleness saves nothing up; who is alone gets
everything.

The bound. Let n tenants wait, R sequences run at most, and C be the cost of the dearest request (prompt + 2 x answer).
The counters of two tenants that both wait differ by at most (R + 1) C: the one that is ahead admits nobody, but what it
runs goes on. The first request of a tenant that was idle stands behind one request of each other tenant at most, so the
others get at most (R + n) C before it, whatever arrives. The same holds for the lanes of a tenant. Admissions past a
sequence whose adapters are not there yet are bounded by the scheduler (`MAX_OVERTAKES`), and so are the steps that the
head waits for a place (`PATIENCE`).
"""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from typing import Generic, TypeVar

from server.engine.batch import ScheduledSequence
from server.engine.sequence import Sequence

OUTPUT_COST = 2  # of a token of the answer; one of the prompt, or one computed again, costs 1
MAX_IDLE_TENANTS = 1024  # whose counters are kept while none of theirs waits
MAX_IDLE_LANES = 64  # of each tenant


@dataclass(slots=True, eq=False)
class Lane:
    """The waiting sequences of a tenant with the same adapters, whatever their weights.

    service: what was computed for it, in costs, or more where it was lifted; members: how many wait or run.
    """

    name: Hashable
    tenant: "Tenant"
    service: int = 0
    members: int = 0
    sequences: list[Sequence] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Tenant:
    """service, members: as of a lane."""

    name: Hashable
    service: int = 0
    members: int = 0
    lanes: "Level[Lane]" = field(default_factory=lambda: Level(MAX_IDLE_LANES))


F = TypeVar("F", Lane, Tenant)


class Level(Generic[F]):
    """Tenants, or the lanes of one: all whose counters are known, those in which somebody waits, and those in which
    nobody waits or runs. Only of the last are the oldest forgotten: what runs may come back to its lane."""

    __slots__ = ("idle", "known", "last", "max_idle", "queued")

    def __init__(self, max_idle: int) -> None:
        self.max_idle = max_idle
        self.known: dict[Hashable, F] = {}
        self.idle: OrderedDict[Hashable, F] = OrderedDict()  # by when the last of theirs ended
        self.queued: dict[Hashable, F] = {}  # by when they began to
        self.last: F | None = None  # who ceased to wait last

    def least(self) -> F:
        """Of those that wait; among equals, who began first."""
        return min(self.queued.values(), key=_service)

    def begins(self, flow: F) -> None:
        """It waits from now on, if it did not before."""
        if flow.name in self.queued:
            return
        floor = self.least() if self.queued else self.last
        if floor is not None:
            flow.service = max(flow.service, floor.service)
        self.queued[flow.name] = flow

    def ceases(self, flow: F) -> None:
        """Nobody of it waits any more."""
        del self.queued[flow.name]
        self.last = flow

    def comes(self, flow: F) -> None:
        """One more of it waits or runs."""
        flow.members += 1
        self.known[flow.name] = flow
        self.idle.pop(flow.name, None)

    def ends(self, flow: F) -> None:
        """One of it neither waits nor runs any more."""
        flow.members -= 1
        if flow.members:
            return
        self.idle[flow.name] = flow
        if len(self.idle) > self.max_idle:
            name, _ = self.idle.popitem(last=False)
            del self.known[name]


class FairQueue:
    """The waiting sequences, and whose each of those is that wait or run."""

    def __init__(self) -> None:
        self._tenants: Level[Tenant] = Level(MAX_IDLE_TENANTS)
        self._lanes: dict[Sequence, Lane] = {}  # of all that wait or run
        self._waiting: dict[Sequence, None] = {}  # in lanes, by arrival
        self._preempted: deque[Sequence] = deque()
        self._first: Sequence | None = None  # once chosen, until it waits no longer

    def __len__(self) -> int:
        return len(self._waiting) + len(self._preempted)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._waiting or sequence in self._preempted

    def __iter__(self) -> Iterator[Sequence]:
        """Those preempted, then by arrival. Over a copy: any thread may ask."""
        return iter([*self._preempted, *self._waiting])

    @property
    def head(self) -> Sequence | None:
        """Who is admitted first. Once chosen it stays so until it is, or until `choose_again`."""
        return self._preempted[0] if self._preempted else self._chosen()

    @property
    def least(self) -> Sequence | None:
        """Whose turn it is by the counters, of those that have not been preempted."""
        return self._tenants.least().lanes.least().sequences[0] if self._waiting else None

    def choose_again(self) -> None:
        """Whose turn it is now becomes the head."""
        self._first = None

    def add(self, sequence: Sequence) -> None:
        name, adapters = self.names(sequence)
        tenant = self._tenants.known.get(name) or Tenant(name)
        lane = tenant.lanes.known.get(adapters) or Lane(adapters, tenant)
        self._lanes[sequence] = lane
        self._tenants.comes(tenant)
        tenant.lanes.comes(lane)
        self._wait(sequence, len(lane.sequences))

    def put_first(self, sequence: Sequence) -> None:
        """A sequence that ran and was preempted, before all others."""
        self._preempted.appendleft(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """A sequence that ran and made way for another tenant or lane, before the others of its own."""
        self._wait(sequence, 0)

    def take(self, sequence: Sequence) -> None:
        """It waits no longer."""
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            return
        del self._waiting[sequence]
        if sequence is self._first:
            self._first = None
        lane = self._lanes[sequence]
        lane.sequences.remove(sequence)
        if not lane.sequences:
            lane.tenant.lanes.ceases(lane)
            if not lane.tenant.lanes.queued:
                self._tenants.ceases(lane.tenant)

    def forget(self, sequence: Sequence) -> None:
        """It has ended, and does not wait."""
        lane = self._lanes.pop(sequence, None)
        if lane is not None:
            lane.tenant.lanes.ends(lane)
            self._tenants.ends(lane.tenant)

    def names(self, sequence: Sequence) -> tuple[Hashable, Hashable]:
        """What tells tenants apart, and the lanes of one."""
        return sequence.request.tenant, frozenset(sequence.digests)

    def lane(self, sequence: Sequence) -> Lane:
        """Of one that waits or runs."""
        return self._lanes[sequence]

    def rank(self, sequence: Sequence) -> tuple[int, int]:
        """Of one that waits or runs: the lower goes first."""
        lane = self._lanes[sequence]
        return lane.tenant.service, lane.service

    def charge(self, entries: Iterable[ScheduledSequence]) -> None:
        """Count what a step computes."""
        for entry in entries:
            lane = self._lanes[entry.sequence]
            cost = entry.count + (OUTPUT_COST - 1) * entry.samples
            lane.service += cost
            lane.tenant.service += cost

    def in_turn(self) -> Iterator[Sequence]:
        """The waiting sequences in the order in which to admit them, by the counters when the next is asked for.

        One that still waits then is passed over, and with it those of its lane: they need the same adapters.
        """
        yield from list(self._preempted)
        passed: Lane | None = None
        if (first := self._chosen()) is not None:
            yield first
            passed = self._lanes[first] if first in self._waiting else None
        tenants = _heap(self._tenants.queued.values())
        lanes: dict[Hashable, list[tuple[int, int, Lane]]] = {}
        while tenants:
            service, place, tenant = tenants[0]
            if service != tenant.service:  # computed for since it was put there
                heapreplace(tenants, (tenant.service, place, tenant))
                continue
            heap = lanes.get(tenant.name)
            if heap is None:
                heap = lanes[tenant.name] = _heap(lane for lane in tenant.lanes.queued.values() if lane is not passed)
            if not heap:
                heappop(tenants)
                continue
            service, place, lane = heap[0]
            if service != lane.service:
                heapreplace(heap, (lane.service, place, lane))
                continue
            sequence = lane.sequences[0]
            yield sequence
            if not lane.sequences or lane.sequences[0] is sequence:
                heappop(heap)

    def _chosen(self) -> Sequence | None:
        if self._first is None:
            self._first = self.least
        return self._first

    def _wait(self, sequence: Sequence, place: int) -> None:
        lane = self._lanes[sequence]
        self._waiting[sequence] = None
        lane.sequences.insert(place, sequence)
        self._tenants.begins(lane.tenant)
        lane.tenant.lanes.begins(lane)


def _heap(flows: Iterable[F]) -> list[tuple[int, int, F]]:
    heap = [(flow.service, place, flow) for place, flow in enumerate(flows)]
    heapify(heap)
    return heap


def _service(flow: Lane | Tenant) -> int:
    return flow.service
