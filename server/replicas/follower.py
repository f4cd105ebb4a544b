"""Hears what other servers have appended, and has the registry read those names in the store."""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import cast

from redis import Redis

from adapters_store.errors import CodedError
from server.replicas.keys import LOOK, Change, Keys, change_of, read_change
from server.replicas.link import RedisAway, RedisLink
from server.replicas.names import SharedNames
from server.replicas.teller import mend

BLOCK_SECONDS = 0.5  # of a read that waits for news; well below the link's time-out
COMPARE_SECONDS = 30.0  # between comparisons with the index, for what a trimmed or emptied stream did not tell
ONE_BY_ONE = 20  # of more names at a time the whole log is listed instead
_BATCH = 1000
_log = logging.getLogger(__name__)
_Entries = list[tuple[bytes, dict[bytes, bytes]]]


class Follower:
    """One thread that reads the stream. Whatever it says, the store decides."""

    def __init__(
        self, link: RedisLink, keys: Keys, names: SharedNames, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._link = link
        self._keys = keys
        self._names = names
        self._clock = clock
        self._last: bytes | None = None  # id of the last entry read; None: the index is to be compared first
        self._compared = 0.0
        self.changes = 0
        self.lag = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="replicas-follow", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.step()
            except RedisAway:
                self._last = None
                self._ended.wait(BLOCK_SECONDS)
            except (CodedError, OSError) as error:  # the store; names in use are asked for again as they are used
                _log.warning("change_not_read", extra={"reason": str(error)})
                self._last = None
                self._ended.wait(BLOCK_SECONDS)

    def step(self) -> None:
        """Compare with the index where that is due, then wait for news once. Raises RedisAway and what the store does.

        The place in the stream is taken before the index is read, so that nothing falls between the two.
        """
        if self._last is None or self._clock() - self._compared > COMPARE_SECONDS:
            last = self._last or self._link.call(self._newest_id)
            self._compare()
            self._last = last
        last = self._last
        entries = self._link.call(partial(self._read, last))
        if not entries:
            return
        if any(LOOK in fields for _, fields in entries):
            self._compare()
        told = (change_of(fields) for _, fields in entries)
        self._take([change for change in told if change is not None])
        self._last = entries[-1][0]

    def _take(self, changes: list[Change]) -> None:
        newest = self._names.newest
        newer = {(each.tenant, each.name) for each in changes if each.version > newest(each.tenant, each.name)}
        if len(newer) > ONE_BY_ONE:
            self._names.catch_up()
        else:
            for tenant, name in sorted(newer):
                self._names.refresh_name(tenant, name)
        self.changes += len(newer)

    def _compare(self) -> None:
        """Both ways: read what the index knows better, and tell it what it lacks."""
        indexed = self._link.call(self._index)
        self._take([Change(tenant, name, version) for (tenant, name), version in indexed.items()])
        heads = self._names.heads().items()
        missing = [Change(*key, version) for key, version in heads if version > indexed.get(key, 0)]
        for start in range(0, len(missing), _BATCH):
            part = missing[start : start + _BATCH]
            self._link.call(partial(mend, self._keys, part))
        self._compared = self._clock()

    def _index(self, redis: Redis) -> dict[tuple[str, str], int]:
        scores = redis.zscan_iter(self._keys.index, count=_BATCH, score_cast_func=bytes)
        found = (read_change(member, score) for member, score in scores)
        return {(each.tenant, each.name): each.version for each in found if each is not None}

    def _newest_id(self, redis: Redis) -> bytes:
        newest = cast(_Entries, redis.xrevrange(self._keys.changes, count=1))
        return newest[0][0] if newest else b"0-0"

    def _read(self, last: bytes, redis: Redis) -> _Entries:
        found = cast(
            "list[tuple[bytes, _Entries]]",
            redis.xread({self._keys.changes: last}, count=_BATCH, block=int(BLOCK_SECONDS * 1000)),
        )
        if not found:
            return []
        entries = found[0][1]
        seconds, micros = redis.time()
        self.lag = max(0.0, seconds + micros / 1e6 - int(entries[0][0].split(b"-")[0]) / 1000)
        return entries
