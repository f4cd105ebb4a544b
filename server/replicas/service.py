"""Everything that a server shares with those beside it, in one piece."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from adapters_store.places import is_remote
from server.replicas.catch_up import BUCKET_SECONDS, FOLDER_SECONDS, CatchUp
from server.replicas.follower import Follower
from server.replicas.fresh_names import FreshNames
from server.replicas.keys import Keys
from server.replicas.link import RedisLink
from server.replicas.names import SharedNames
from server.replicas.presence import Presence
from server.replicas.rate import Rate, Taken
from server.replicas.rate_limiter import RateLimiter
from server.replicas.state import LinkState, Member, SharingStats
from server.replicas.teller import Notices, Teller

MAX_DIGESTS = 1000  # told of each place


@dataclass(frozen=True, slots=True)
class Place:
    """What servers have in common. store, redis: URLs; rate: requests of each client that has no rate of its own."""

    store: str
    redis: str | None = None
    rate: Rate | None = None


class Replicas:
    """This server among those over the same store. `start` and `stop` are called once; `stop` blocks for seconds.

    notices: what the registry has committed, to be told; own: what this server tells of itself.
    """

    def __init__(
        self,
        place: Place,
        registry: SharedNames,
        base_names: tuple[str, ...],
        notices: Notices,
        own: Callable[[], Member],
    ) -> None:
        keys = Keys.of_store(place.store)
        self._notices = notices
        self._presence = Presence(keys, own)
        self._link = RedisLink(place.redis) if place.redis is not None else None
        self._teller = Teller(self._link, keys, self._presence, notices) if self._link else None
        self._follower = Follower(self._link, keys, registry) if self._link else None
        alone = place.store.startswith("memory:")  # nobody else can reach it
        self._fresh = None if alone else FreshNames(registry, base_names)
        interval = BUCKET_SECONDS if is_remote(place.store) else FOLDER_SECONDS
        self._catch_up = None if alone else CatchUp(registry, interval)
        self.rate = place.rate
        self._limiter = RateLimiter(keys, self._link, self._presence.count)

    def start(self) -> None:
        for part in (self._teller, self._follower, self._catch_up):
            if part is not None:
                part.start()

    def stop(self) -> None:
        for part in (self._catch_up, self._follower, self._teller):
            if part is not None:
                part.stop()
        for closing in (self._fresh, self._limiter, self._link):
            if closing is not None:
                closing.close()

    async def ensure(self, reference: str, tenant: str) -> None:
        """Before the registry is asked for a reference: see FreshNames.ensure."""
        if self._fresh is not None:
            await self._fresh.ensure(reference, tenant)

    async def take(self, client: str, rate: Rate, amount: int = 1) -> Taken:
        """See RateLimiter.take."""
        return await self._limiter.take(client, rate, amount)

    def settle(self, taken: Taken, used: int) -> None:
        """See RateLimiter.settle."""
        self._limiter.settle(taken, used)

    def members(self) -> list[Member]:
        """This server first, then those it has heard of lately. From memory."""
        return self._presence.members()

    def count(self) -> int:
        """Servers alive, this one included."""
        return self._presence.count()

    def link(self) -> LinkState:
        return self._link.state() if self._link is not None else LinkState()

    def stats(self) -> SharingStats:
        stats = SharingStats(waiting=len(self._notices))
        if self._follower is not None:
            stats = replace(stats, changes=self._follower.changes, lag=self._follower.lag)
        if self._fresh is not None:
            stats = replace(stats, checks=self._fresh.checks, failed_checks=self._fresh.failed)
        return stats


def placed(digests: Sequence[str], residency: Callable[[str], str]) -> dict[str, list[str]]:
    """Digests by where they are, those left out that are in the store only."""
    places: dict[str, list[str]] = {}
    for digest in digests:
        place = residency(digest)
        if place != "absent" and len(places.setdefault(place, [])) < MAX_DIGESTS:
            places[place].append(digest)
    return places
