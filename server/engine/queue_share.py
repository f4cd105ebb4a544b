"""Whose place in a full queue a newcomer takes: a flood must not keep others out. No tensors."""

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Protocol, TypeVar


class Held(Protocol):
    """A request that has a place. waits: whether it has not begun to run."""

    @property
    def tenant(self) -> Hashable: ...
    @property
    def adapters(self) -> Hashable: ...
    @property
    def waits(self) -> bool: ...


H = TypeVar("H", bound=Held)


def giving_way(held: Iterable[H], tenant: Hashable, adapters: Hashable, count: int) -> list[H]:
    """Who gives way to `count` more requests of these adapters of a tenant; fewer than that if some must be refused.

    held: by arrival. The newest that waits goes, of the tenant that holds most, and of its adapters with most; but
    only for a tenant that holds at least two fewer, or else for adapters of the same tenant that do: so two cannot
    push each other out in turn, and of n tenants each is sure of one place less than the nth part.
    """
    everyone = list(held)
    tenants = Counter(each.tenant for each in everyone)
    lanes = Counter((each.tenant, each.adapters) for each in everyone)
    waiting = [each for each in everyone if each.waits]
    found: list[H] = []
    while len(found) < count:
        able = [each for each in waiting if tenants[each.tenant] >= tenants[tenant] + 2]
        if not able:
            least = lanes[tenant, adapters] + 2
            able = [each for each in waiting if each.tenant == tenant and lanes[tenant, each.adapters] >= least]
        if not able:
            break
        chosen = max(reversed(able), key=lambda each: (tenants[each.tenant], lanes[each.tenant, each.adapters]))
        waiting.remove(chosen)
        found.append(chosen)
        tenants[chosen.tenant] -= 1
        tenants[tenant] += 1
        lanes[chosen.tenant, chosen.adapters] -= 1
        lanes[tenant, adapters] += 1
    return found
