"""The parts together: with Redis, without it, and over a store that nobody shares."""

import asyncio
import threading
import time

import pytest

from server.replicas.rate import Rate
from server.replicas.service import Place, Replicas
from server.replicas.state import LinkState, Member, SharingStats
from server.replicas.teller import Notices
from tests.replicas.support import Names
from tests.support.redis_server import RedisServer, until
from tests.support.server_process import free_port

SOON = 30.0


class Asked(Names):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def refresh_name(self, tenant: str, name: str) -> bool:
        self.asked.append(name)
        return False

    def catch_up(self) -> None:
        pass


def member(identity: str) -> Member:
    return Member(identity, "http://h", "tiny", 0, 0, 0.0, {})


def replicas(place: Place, names: Names, identity: str = "id", notices: Notices | None = None) -> Replicas:
    return Replicas(place, names, ("tiny",), notices or Notices(), lambda: member(identity))


async def test_a_store_in_memory_is_nobody_elses() -> None:
    names = Asked()
    alone = replicas(Place("memory://"), names)
    alone.start()
    await alone.ensure("legal", "public")
    await alone.ensure("new", "public")
    assert names.asked == []
    assert (await alone.take("c", Rate(1, 60))).seconds == 0
    assert (alone.members(), alone.count()) == ([member("id")], 1)
    assert (alone.link(), alone.stats()) == (LinkState(), SharingStats())
    await asyncio.to_thread(alone.stop)


async def test_a_folder_may_be_shared_without_redis() -> None:
    names = Asked()
    server = replicas(Place("/somewhere", rate=Rate(1, 86400)), names)
    server.start()
    await server.ensure("legal", "public")
    await server.ensure("new", "public")
    assert names.asked == ["legal", "new"]
    assert server.stats() == SharingStats(checks=2)
    assert server.rate == Rate(1, 86400)
    taken = await server.take("c", server.rate, 5)
    assert taken.seconds == 0, "the first is past the limit, and it is settled"
    assert (await server.take("c", server.rate)).seconds > 0
    server.settle(taken, 0)
    assert (await server.take("c", server.rate)).seconds == 0
    assert not server.link().configured
    await asyncio.to_thread(server.stop)


async def test_with_redis_servers_know_each_other_and_share_the_limit(redis: RedisServer) -> None:
    place = Place("/somewhere", redis.url, Rate(2, 86400))
    pair = [replicas(place, Asked(), identity) for identity in ("id1", "id2")]
    other = replicas(Place("/elsewhere", redis.url), Asked(), "id3")
    for server in (*pair, other):
        server.start()
    until(lambda: all(server.count() == 2 for server in pair), SOON, "the two know each other")
    assert [each.id for each in pair[1].members()] == ["id2", "id1"]
    assert other.count() == 1, "another store"
    assert [bool((await pair[turn % 2].take("c", Rate(2, 86400))).seconds) for turn in range(4)] == [
        False,
        False,
        True,
        True,
    ]
    await asyncio.to_thread(pair[0].stop)
    until(lambda: pair[1].count() == 1, SOON, "one has left")
    for server in (pair[1], other):
        await asyncio.to_thread(server.stop)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("replicas-")]


async def test_what_is_committed_is_counted_until_it_is_told(redis: RedisServer) -> None:
    notices = Notices()
    notices.announce("public", "legal", 2)
    server = replicas(Place("/somewhere", redis.url), Asked(), notices=notices)
    assert server.stats().waiting == 1
    server.start()
    until(lambda: server.stats().waiting == 0, SOON, "it is told")
    assert server.link().up
    await asyncio.to_thread(server.stop)


@pytest.mark.parametrize("fault", ["refused", "frozen"])
async def test_it_starts_and_stops_whatever_redis_does(fault: str, redis: RedisServer) -> None:
    url = redis.url if fault == "frozen" else f"redis://127.0.0.1:{free_port()}"
    if fault == "frozen":
        redis.freeze()
    server = replicas(Place("/somewhere", url), Asked())
    server.start()
    until(lambda: server.link().failures, SOON, "it was tried")
    await server.ensure("legal", "public")
    started = time.monotonic()
    await asyncio.to_thread(server.stop)
    assert time.monotonic() - started < SOON
