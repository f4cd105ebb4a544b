"""No answer older than the bound, no waiting in steady use, and a store that is away or is asked too much."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from adapters_store.errors import StoreUnavailable
from server.errors import Overloaded
from server.replicas import fresh_names
from server.replicas.fresh_names import AHEAD_SECONDS, AWAY_SECONDS, BOUND_SECONDS, MISS_SECONDS, FreshNames
from tests.replicas.support import Names

KNOWN = "legal"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Store(Names):
    """Counts inquiries; `gate` holds them, `failing` lets them fail."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.there: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.failing = False

    def refresh_name(self, tenant: str, name: str) -> bool:
        self.asked.append(name)
        assert self.gate.wait(30)
        if self.failing:
            raise StoreUnavailable("no")
        self.names |= {each: version for each, version in self.there.items() if each == name}
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
async def fresh(store: Store, clock: Clock) -> AsyncIterator[FreshNames]:
    made = FreshNames(store, ("acme/tiny-base",), clock)
    yield made
    store.gate.set()
    made.close()


async def settle(store: Store, count: int) -> None:
    async with asyncio.timeout(30):
        while len(store.asked) < count:  # noqa: ASYNC110 - counted in other threads
            await asyncio.sleep(0.001)


async def test_a_name_is_asked_for_at_its_first_use_and_then_believed(fresh: FreshNames, store: Store) -> None:
    for reference in (KNOWN, f"{KNOWN}@1", f"base:{KNOWN}", f"acme/tiny-base:{KNOWN}"):
        await fresh.ensure(reference, "public")
    assert store.asked == [KNOWN]


async def test_steady_use_asks_ahead_and_never_waits(fresh: FreshNames, store: Store, clock: Clock) -> None:
    await fresh.ensure(KNOWN, "public")
    store.gate.clear()
    clock.now += AHEAD_SECONDS
    for _ in range(5):
        await asyncio.wait_for(fresh.ensure(KNOWN, "public"), 30)  # the store does not answer, and nobody minds
    await settle(store, 2)
    assert store.asked == [KNOWN, KNOWN], "one inquiry at a time"


async def test_after_the_bound_the_store_comes_first(fresh: FreshNames, store: Store, clock: Clock) -> None:
    await fresh.ensure(KNOWN, "public")
    clock.now += BOUND_SECONDS
    store.there = {KNOWN: 2}
    await fresh.ensure(KNOWN, "public")
    assert store.newest("public", KNOWN) == 2


async def test_an_inquiry_counts_from_its_beginning(fresh: FreshNames, store: Store, clock: Clock) -> None:
    store.gate.clear()
    first = asyncio.create_task(fresh.ensure(KNOWN, "public"))
    await settle(store, 1)
    clock.now += BOUND_SECONDS  # what the store says may be that old by now
    store.gate.set()
    await first
    await fresh.ensure(KNOWN, "public")
    assert store.asked == [KNOWN, KNOWN]


async def test_an_unknown_name_is_pulled_and_a_miss_remembered(fresh: FreshNames, store: Store, clock: Clock) -> None:
    for _ in range(3):
        await fresh.ensure("new", "public")
    assert store.asked == ["new"]
    store.there = {"new": 1}
    clock.now += MISS_SECONDS
    await fresh.ensure("new", "public")
    assert store.newest("public", "new") == 1


async def test_many_who_ask_for_one_name_are_one_inquiry(
    fresh: FreshNames, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh_names, "UNKNOWN_WAIT_SECONDS", 60.0)  # a busy machine shall not end the waiting
    store.gate.clear()
    asking = [asyncio.create_task(fresh.ensure("new", "public")) for _ in range(200)]
    await settle(store, 1)
    store.gate.set()
    await asyncio.gather(*asking)
    assert store.asked == ["new"]


async def test_a_flood_of_unknown_names_is_refused_and_harms_no_known_one(fresh: FreshNames, store: Store) -> None:
    store.gate.clear()
    flood = [asyncio.create_task(fresh.ensure(f"n{number}", "public")) for number in range(300)]
    await settle(store, 4)
    refused = [task for task in flood if task.done() and isinstance(task.exception(), Overloaded)]
    assert len(refused) == 300 - fresh_names.MAX_UNKNOWN
    known = asyncio.create_task(fresh.ensure(KNOWN, "public"))
    await settle(store, 5)
    assert store.asked[-1] == KNOWN, "it does not stand behind the flood"
    store.gate.set()
    await known
    await asyncio.gather(*flood, return_exceptions=True)


@pytest.mark.parametrize(
    "reference", ["sha256:" + "0" * 64, "../etc", "", "A", "x" * 65, "base", "tgi", "acme/tiny-base", "a@0", "what:a"]
)
async def test_what_cannot_be_there_is_not_asked_for(reference: str, fresh: FreshNames, store: Store) -> None:
    await fresh.ensure(reference, "public")
    assert store.asked == []


async def test_while_the_store_is_away_known_names_serve_and_unknown_ones_are_not_denied(
    fresh: FreshNames, store: Store, clock: Clock
) -> None:
    store.failing = True
    await fresh.ensure(KNOWN, "public")
    with pytest.raises(StoreUnavailable):
        await fresh.ensure("new", "public")
    assert fresh.failed == 2
    store.gate.clear()
    await asyncio.wait_for(fresh.ensure(KNOWN, "public"), 30)  # not waited for, so soon after a failure
    store.failing = False
    store.gate.set()
    store.there = {KNOWN: 2}
    clock.now += AWAY_SECONDS
    await fresh.ensure(KNOWN, "public")
    await settle(store, 3)
    assert store.newest("public", KNOWN) == 2


async def test_a_store_that_hangs_is_waited_for_only_so_long(
    fresh: FreshNames, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh_names, "KNOWN_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(fresh_names, "UNKNOWN_WAIT_SECONDS", 0.05)
    store.gate.clear()
    await asyncio.wait_for(fresh.ensure(KNOWN, "public"), 30)
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(fresh.ensure("new", "public"), 30)
    assert fresh.failed == 2


async def test_who_leaves_does_not_end_the_inquiry_of_others(fresh: FreshNames, store: Store) -> None:
    store.gate.clear()
    leaving, staying = (asyncio.create_task(fresh.ensure("new", "public")) for _ in range(2))
    await settle(store, 1)
    leaving.cancel()
    store.there = {"new": 1}
    store.gate.set()
    await staying
    assert store.newest("public", "new") == 1


async def test_only_so_many_names_are_remembered(
    fresh: FreshNames, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh_names, "MAX_REMEMBERED", 3)
    for number in (0, 1, 2, 3, 0, 3):
        await fresh.ensure(f"n{number}", "public")
    assert store.asked == ["n0", "n1", "n2", "n3", "n0"]
