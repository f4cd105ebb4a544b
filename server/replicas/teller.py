"""Tells the other servers what this one has appended, from a queue: whoever commits waits for nobody."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from redis import Redis

from server.replicas.keys import LOOK, Change, Keys
from server.replicas.link import RedisAway, RedisLink
from server.replicas.presence import Presence

MAX_WAITING = 10_000  # notices kept while Redis is away; the index of names makes up for more
STREAM_LENGTH = 10_000
BEAT_SECONDS = 1.0
BATCH = 500


class Notices:
    """What is still to be told. Thread-safe; the oldest are forgotten where too many wait."""

    def __init__(self) -> None:
        self._queue: deque[Change] = deque(maxlen=MAX_WAITING)
        self._woken = threading.Event()

    def __len__(self) -> int:
        return len(self._queue)

    def announce(self, tenant: str, name: str, version: int) -> None:
        """Never blocks. From any thread."""
        self._queue.append(Change(tenant, name, version))
        self._woken.set()

    def wake(self) -> None:
        self._woken.set()

    def wait(self, seconds: float) -> bool:
        """Whether something came, or `wake` was called, before the time was over."""
        return self._woken.wait(seconds)

    def first(self) -> list[Change]:
        """Those that wait longest, up to a batch; they stay until `sent`."""
        self._woken.clear()
        return [change for change, _ in zip(self._queue.copy(), range(BATCH), strict=False)]

    def sent(self, batch: Sequence[Change]) -> None:
        """Some of the batch may have been forgotten meanwhile, where too many came: no other is taken for them."""
        for change in batch:
            if self._queue and self._queue[0] is change:
                self._queue.popleft()


class Teller:
    """One thread: notices as they come, and this server's presence once a second."""

    def __init__(
        self,
        link: RedisLink,
        keys: Keys,
        presence: Presence,
        notices: Notices,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._keys = keys
        self._presence = presence
        self._notices = notices
        self._clock = clock
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="replicas-tell", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Sends what is left, says farewell, and ends: within two time-outs of the link."""
        self._ended.set()
        self._notices.wake()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._link.call(self._presence.tell)
                self._send_for(BEAT_SECONDS)
            except RedisAway:
                self._ended.wait(BEAT_SECONDS)
        with suppress(RedisAway):
            self._send()
            self._link.call(self._presence.leave)

    def _send_for(self, seconds: float) -> None:
        end = self._clock() + seconds
        self._send()
        while not self._ended.is_set() and (left := end - self._clock()) > 0:
            if self._notices.wait(left):
                self._send()

    def _send(self) -> None:
        while batch := self._notices.first():
            self._link.call(partial(publish, self._keys, batch))
            self._notices.sent(batch)


def publish(keys: Keys, changes: Sequence[Change], redis: Redis) -> None:
    """Index first: whoever is woken by the stream and looks there finds it."""
    with redis.pipeline(transaction=True) as batch:
        batch.zadd(keys.index, {change.member: change.version for change in changes}, gt=True)
        for change in changes:
            batch.xadd(keys.changes, change.entry(), maxlen=STREAM_LENGTH, approximate=True)
        batch.execute()


def mend(keys: Keys, missing: Sequence[Change], redis: Redis) -> None:
    """Put into the index what it lacks, as after a restart of Redis, and have the others look there."""
    with redis.pipeline(transaction=True) as batch:
        batch.zadd(keys.index, {change.member: change.version for change in missing}, gt=True)
        batch.xadd(keys.changes, {LOOK: b"1"}, maxlen=STREAM_LENGTH, approximate=True)
        batch.execute()
