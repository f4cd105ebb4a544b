"""Limits of requests and tokens, counted in Redis for all servers, and by each for its share while Redis is away.

A sliding window made of two counters, by plain INCR in a transaction. The `limits` package would do the same by Lua
scripts, which we avoid: an ACL may forbid them, and several of Redis's holes were in Lua.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from redis import Redis

from server.replicas.keys import Keys
from server.replicas.link import FAST_SECONDS, RedisAway, RedisLink
from server.replicas.rate import LocalCounts, Rate, Taken

_THREADS = 4


class RateLimiter:
    """Used from the event loop. link: None counts in this server alone; servers: how many are alive, this one too."""

    def __init__(
        self,
        keys: Keys,
        link: RedisLink | None,
        servers: Callable[[], int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._link = link
        self._servers = servers
        self._clock = clock
        self._local = LocalCounts(clock)
        self._threads = ThreadPoolExecutor(_THREADS, "rate-limit")

    async def take(self, client: str, rate: Rate, amount: int = 1) -> Taken:
        """Count an amount if one more fits; the answer has the seconds to wait if not.

        Waits for Redis at most FAST_SECONDS, and not at all while the link is down.
        """
        taken = await self._shared(client, rate, amount)
        if taken is None:
            taken = self._local.ask(client, rate, amount, self._servers())
        if not taken.seconds:
            # Also where Redis decided: it may be away at the next request.
            self._local.add(client, rate, amount, taken.window)
        return replace(taken, rate=rate)

    def settle(self, taken: Taken, used: int) -> None:
        """Count what was used in place of the amount that was taken. Nobody waits for Redis; if it is away then, it
        goes on with that amount until the window is over.
        """
        more = used - taken.amount
        self._local.add(taken.client, taken.rate, more, taken.window)
        if more and taken.shared and self._link is not None:
            work = partial(self._add, taken, more)
            self._threads.submit(self._quietly, self._link, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _shared(self, client: str, rate: Rate, amount: int) -> Taken | None:
        link = self._link
        if link is None or not link.up:
            return None
        work = partial(self._count, client, rate, amount)
        count = asyncio.get_running_loop().run_in_executor(self._threads, link.fast, work)
        try:
            async with asyncio.timeout(FAST_SECONDS):
                return await count
        except (RedisAway, TimeoutError):
            return None

    def _count(self, client: str, rate: Rate, amount: int, redis: Redis) -> Taken:
        now = self._clock()
        index = rate.index(now)
        key = self._key(client, rate, index)
        with redis.pipeline(transaction=True) as batch:
            batch.incrby(key, amount)
            batch.expire(key, 2 * rate.window)
            batch.get(self._key(client, rate, index - 1))
            current, _, previous = batch.execute()
        counts = (int(previous or 0), int(current) - amount)
        taken = Taken.of(rate, client, amount, counts, now, shared=True)
        if taken.seconds:
            redis.decrby(key, amount)  # a refused request does not count, else who keeps asking would never get in
        return taken

    def _add(self, taken: Taken, amount: int, redis: Redis) -> None:
        key = self._key(taken.client, taken.rate, taken.window)
        with redis.pipeline(transaction=True) as batch:
            batch.incrby(key, amount)
            batch.expire(key, 2 * taken.rate.window)
            batch.execute()

    @staticmethod
    def _quietly(link: RedisLink, work: Callable[[Redis], None]) -> None:
        with contextlib.suppress(RedisAway):  # the link has said so
            link.fast(work)

    def _key(self, client: str, rate: Rate, index: int) -> str:
        return self._keys.rate(f"{rate.limit}-{rate.window}", client, index)
