"""Servers beside this one, on paper; what arrives from them is put in place by the test."""

from collections.abc import Callable

from server.replicas.rate import Rate, Taken
from server.replicas.state import LinkState, Member, SharingStats

OWN = Member("a" * 32, "http://10.0.0.1:8000", "acme/tiny-base", 2, 1, 0.25, {"resident": ["d1"]})
OTHER = Member("b" * 32, "http://10.0.0.2:8000", "acme/tiny-base", 0, 0, 0.0, {}, age=0.5)


class FakeReplicas:
    """asked: references that were to be made fresh, with their tenants; `arrives` is called before that is done.

    seconds: what every client has to wait.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.clients: list[str] = []
        self.arrives: Callable[[], object] = lambda: None
        self.settled: list[tuple[str, int, int]] = []
        self.rate: Rate | None = Rate(1000, 60)
        self.seconds = 0.0
        self.others: list[Member] = []
        self.redis = LinkState()

    async def ensure(self, reference: str, tenant: str) -> None:
        self.asked.append((reference, tenant))
        self.arrives()

    async def take(self, client: str, rate: Rate, amount: int = 1) -> Taken:
        self.clients.append(client)
        return Taken(rate, client, amount, self.seconds, rate.limit - amount, 1.5, 0, shared=False)

    def settle(self, taken: Taken, used: int) -> None:
        self.settled.append((taken.client, taken.amount, used))

    def members(self) -> list[Member]:
        return [OWN, *self.others]

    def count(self) -> int:
        return 1 + len(self.others)

    def link(self) -> LinkState:
        return self.redis

    def stats(self) -> SharingStats:
        return SharingStats(changes=3, lag=0.01, waiting=1, checks=7, failed_checks=2)
