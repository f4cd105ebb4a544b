"""The limit of requests per client, counted in Redis for all servers, and by each for its share while Redis is away.

A sliding window made of two counters, by plain INCR in a transaction. The `limits` package would do the same by Lua
scripts, which we avoid: an ACL may forbid them, and several of Redis's holes were in Lua.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from redis import Redis

from server.replicas.keys import Keys
from server.replicas.link import FAST_SECONDS, RedisAway, RedisLink
from server.replicas.rate import LocalCounts, Rate

_THREADS = 4


class RateLimiter:
    """Used from the event loop. link: None counts in this server alone; servers: how many are alive, this one too."""

    def __init__(
        self,
        rate: Rate,
        keys: Keys,
        link: RedisLink | None,
        servers: Callable[[], int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rate = rate
        self._keys = keys
        self._link = link
        self._servers = servers
        self._clock = clock
        self._local = LocalCounts(rate, clock)
        self._threads = ThreadPoolExecutor(_THREADS, "rate-limit")

    async def wait(self, client: str) -> float:
        """0 and the request counts, or the seconds after which the client may ask again.

        Waits for Redis at most FAST_SECONDS, and not at all while the link is down.
        """
        seconds = await self._shared(client)
        if seconds is None:
            seconds = self._local.wait(client, self._servers())
        if not seconds:
            self._local.add(client)  # also where Redis decided: it may be away at the next request
        return seconds

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _shared(self, client: str) -> float | None:
        link = self._link
        if link is None or not link.up:
            return None
        work = partial(self._count, client)
        count = asyncio.get_running_loop().run_in_executor(self._threads, link.fast, work)
        try:
            async with asyncio.timeout(FAST_SECONDS):
                return await count
        except (RedisAway, TimeoutError):
            return None

    def _count(self, client: str, redis: Redis) -> float:
        now = self._clock()
        index = self._rate.index(now)
        limit = f"{self._rate.limit}-{self._rate.window}"
        key = self._keys.rate(limit, client, index)
        with redis.pipeline(transaction=True) as batch:
            batch.incr(key)
            batch.expire(key, 2 * self._rate.window)
            batch.get(self._keys.rate(limit, client, index - 1))
            current, _, previous = batch.execute()
        seconds = self._rate.wait(int(previous or 0), int(current) - 1, now)
        if seconds:
            redis.decr(key)  # a refused request does not count, else who keeps asking would never get in again
        return seconds
