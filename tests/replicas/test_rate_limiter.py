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


class Limiter(RateLimiter):
    """With one rate."""

    def __init__(self, link: RedisLink | None, text: str, servers: int) -> None:
        super().__init__(KEYS, link, lambda: servers, lambda: NOW)
        self.rate = Rate.parse(text)

    async def wait(self, client: str, amount: int = 1) -> float:
        return (await self.take(client, self.rate, amount)).seconds


def limiter(link: RedisLink | None, text: str = "6/minute", servers: int = 2) -> Limiter:
    return Limiter(link, text, servers)


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


async def test_what_was_taken_and_not_used_is_given_back(redis: RedisServer) -> None:
    links = [up(redis.url) for _ in range(2)]
    ours = [limiter(link, "100/minute") for link in links]
    first = await ours[0].take("c", ours[0].rate, 90)
    assert (first.seconds, first.remaining, first.shared) == (0, 10, True)
    second = await ours[1].take("c", ours[1].rate, 50)
    assert (second.seconds, second.remaining) == (0, 0), "one more fits, so all of it is let in"
    assert (await ours[0].take("c", ours[0].rate, 1)).seconds > 0
    ours[0].settle(first, 20)
    ours[1].settle(second, 60)
    for each in ours:
        each._threads.shutdown(wait=True)
    with redis.client() as client:
        key = KEYS.rate("100-60", "c", int(NOW // 60))
        assert int(client.get(key) or 0) == 80
        assert 0 < client.ttl(key) <= 120


async def test_what_was_taken_is_settled_while_redis_is_away(redis: RedisServer) -> None:
    link = up(redis.url)
    ours = limiter(link, "100/minute", servers=1)
    taken = await ours.take("c", ours.rate, 100)
    redis.kill()
    with pytest.raises(RedisAway):
        link.call(lambda client: client.ping())
    assert (await ours.take("c", ours.rate)).seconds > 0
    ours.settle(taken, 30)
    again = await ours.take("c", ours.rate, 70)
    assert (again.seconds, again.remaining, again.shared) == (0, 0, False)
    ours.close()


async def test_limits_of_one_client_do_not_mix(redis: RedisServer) -> None:
    ours = limiter(up(redis.url), "2/minute")
    assert [bool(await ours.wait("key-a")) for _ in range(3)] == [False, False, True]
    assert await ours.wait("tokens-a") == 0
    assert (await ours.take("key-a", Rate.parse("2/hour"))).seconds == 0
    ours.close()
