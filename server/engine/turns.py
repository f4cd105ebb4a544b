"""Turns among running sequences, by tenant and by lane: who computes where not all can, and who makes way."""

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

from server.engine.fair_queue import Lane, Tenant
from server.engine.sequence import Sequence

MAX_PREEMPTIONS = 3  # after these a sequence is preempted only if nothing else can be

LaneOf = Callable[[Sequence], Lane]


def interleaved(sequences: Iterable[Sequence], lane_of: LaneOf) -> list[Sequence]:
    """The first of each tenant before the second of any, and so on; within a tenant the same for its lanes.

    Those of one lane stay in order, and so does the very first.
    """
    flows: tuple[Callable[[Sequence], Lane | Tenant], ...] = (lane_of, lambda sequence: lane_of(sequence).tenant)
    found = list(sequences)
    for flow_of in flows:
        seen: Counter[Lane | Tenant] = Counter()
        places: dict[Sequence, int] = {}
        for sequence in found:
            flow = flow_of(sequence)
            places[sequence] = seen[flow]
            seen[flow] += 1
        found.sort(key=places.__getitem__)
    return found


def crowding(running: Items[Sequence], claimant: Sequence, lane_of: LaneOf) -> Sequence | None:
    """Who makes way for a waiting sequence: the newest of the tenant that runs most, if it runs two more than the
    claimant's, so that the two do not take each other's place in turn; else the same for the lanes of that tenant.
    """
    own = lane_of(claimant)
    lanes = [lane_of(sequence) for sequence in running]
    levels: tuple[tuple[list[Lane | Tenant], Lane | Tenant], ...] = (
        ([lane.tenant for lane in lanes], own.tenant),
        ([lane if lane.tenant is own.tenant else own for lane in lanes], own),
    )
    for flows, mine in levels:
        counts = Counter(flows)
        most = max(counts.values(), default=0)
        if most < counts[mine] + 2:
            continue
        for sequence, flow in reversed(list(zip(running, flows, strict=True))[1:]):
            if counts[flow] == most and sequence.preemptions < MAX_PREEMPTIONS:
                return sequence
    return None


def victim(running: Items[Sequence], lane_of: LaneOf) -> Sequence:
    """Whose memory others get: the newest of the tenant that runs most, sparing those preempted often.

    The oldest of all always gets on.
    """
    spared = [sequence for sequence in running[1:] if sequence.preemptions < MAX_PREEMPTIONS]
    counts = Counter(lane_of(sequence).tenant for sequence in running)
    return max(reversed(spared), key=lambda s: counts[lane_of(s).tenant]) if spared else running[-1]
