"""One limit over all servers with Redis; each its share without; and nobody waits for Redis."""

import asyncio
import time

import pytest
from redis import Redis

from server.replicas.keys import Keys
from server.replicas.link import RedisAway, RedisLink
from server.replicas.rate import Rate
from server.replicas.rate_limiter import RateLimiter
from tests.support.redis_server import RedisServer, Wire
from tests.support.server_process import free_port

KEYS = Keys("test")
NOW = 6000.0  # the beginning of a minute
PATIENCE = 5.0  # of a machine that does other things


def up(url: str) -> RedisLink:
    link = RedisLink(url)
    assert link.call(lambda redis: redis.ping())
    return link


def limiter(link: RedisLink | None, text: str = "6/minute", servers: int = 2) -> RateLimiter:
    return RateLimiter(Rate.parse(text), KEYS, link, lambda: servers, lambda: NOW)


async def test_without_redis_one_server_counts_for_itself() -> None:
    alone = limiter(None, servers=1)
    assert [bool(await alone.wait("c")) for _ in range(8)] == [False] * 6 + [True] * 2
    assert await alone.wait("other") == 0
    alone.close()


async def test_two_servers_have_one_limit(redis: RedisServer) -> None:
    links = [up(redis.url) for _ in range(2)]
    ours = [limiter(link) for link in links]
    for turn in range(6):
        assert await ours[turn % 2].wait("c") == 0, turn
    for each in ours:
        assert 0 < await each.wait("c") <= 75
        assert await each.wait("other") == 0
    with redis.client() as client:
        key = KEYS.rate("6-60", "c", int(NOW // 60))
        assert int(client.get(key) or 0) == 6, "refused requests do not count"
        assert 0 < client.ttl(key) <= 120
    for each in ours:
        each.close()


async def test_no_script_is_run(redis: RedisServer) -> None:
    with redis.client() as admin:
        admin.execute_command("ACL", "SETUSER", "default", "-@scripting")
    link = up(redis.url)
    ours = limiter(link)
    assert [bool(await ours.wait("c")) for _ in range(8)] == [False] * 6 + [True] * 2
    assert link.up
    ours.close()


async def test_while_redis_is_away_each_has_its_share(redis: RedisServer) -> None:
    link = up(redis.url)
    ours = limiter(link)
    assert await ours.wait("c") == 0
    redis.kill()
    with pytest.raises(RedisAway):
        link.call(lambda client: client.ping())
    assert [bool(await ours.wait("c")) for _ in range(4)] == [False, False, True, True], "3 of 6, one used before"
    ours.close()


async def test_a_link_that_is_down_is_not_touched() -> None:
    with Wire(free_port()) as wire:
        ours = limiter(RedisLink(wire.url))
        for _ in range(3):
            await ours.wait("c")
        assert wire.connections == 0
        ours.close()


async def test_a_frozen_redis_delays_a_few_requests_a_little(redis: RedisServer) -> None:
    link = up(redis.url)
    ours = limiter(link, "1000/minute")
    assert await ours.wait("c") == 0
    redis.freeze()
    started = time.monotonic()
    waits = await asyncio.gather(*(ours.wait("c") for _ in range(100)))
    assert time.monotonic() - started < PATIENCE, "together, not one after the other"
    assert not any(waits)
    while link.up:  # the calls that were given up have yet to end
        assert time.monotonic() - started < PATIENCE
        await asyncio.sleep(0.01)
    ours.close()


async def test_garbage_in_the_counters_is_no_reason_to_refuse(redis: RedisServer) -> None:
    def spoil(client: Redis) -> object:
        return client.set(KEYS.rate("6-60", "c", int(NOW // 60)), "many")

    link = up(redis.url)
    link.call(spoil)
    ours = limiter(link)
    assert [bool(await ours.wait("c")) for _ in range(5)] == [False] * 3 + [True] * 2, "its own share"
    ours.close()
