"""The one way to Redis: every call has a time-out, none is repeated, and a breaker spares the calls after a failed one.

Scripts (EVAL) are not used: an ACL may forbid them, and several of Redis's holes were in Lua.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from server.replicas.state import LinkState

T = TypeVar("T")
TIMEOUT_SECONDS = 1.0  # of calls that nobody waits for
FAST_SECONDS = 0.04  # of calls that a request waits for
PAUSE_SECONDS = 1.0  # after a failure; with the time-out of the next try a Redis that is back is seen within 3 s
FAST_FAILURES = 3  # in a row: a busy machine alone makes one call late now and then
LOG_SECONDS = 30.0
_CONNECTIONS = 8
_log = logging.getLogger(__name__)


class RedisAway(Exception):
    """Redis did not answer as it should, or was not even asked because it lately did not."""


class RedisLink:
    """Thread-safe. `call` is for threads of our own, `fast` for work that a request waits for."""

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._patient = client_of(url, TIMEOUT_SECONDS)
        self._quick = client_of(url, FAST_SECONDS)
        self._clock = clock
        self._lock = threading.Lock()
        self._up = False
        self._closed_until = 0.0  # no call before this time
        self._probing = False
        self._in_a_row = 0
        self._logged = float("-inf")
        self._calls = self._failures = self._openings = 0

    @property
    def up(self) -> bool:
        return self._up

    def state(self) -> LinkState:
        with self._lock:
            return LinkState(True, self._up, self._calls, self._failures, self._openings)

    def call(self, work: Callable[[Redis], T]) -> T:
        """The result of `work`. After a failure one caller a second tries again, the others are spared.

        Raises RedisAway, also where the answer makes no sense to `work`.
        """
        with self._lock:
            if not self._up:
                if self._probing or self._clock() < self._closed_until:
                    raise RedisAway
                self._probing = True
            self._calls += 1
        return self._try(work, self._patient, 1)

    def fast(self, work: Callable[[Redis], T]) -> T:
        """As `call`, in a shorter time and only while the link is up."""
        with self._lock:
            if not self._up:
                raise RedisAway
            self._calls += 1
        return self._try(work, self._quick, FAST_FAILURES)

    def close(self) -> None:
        for client in (self._patient, self._quick):
            client.close()

    def _try(self, work: Callable[[Redis], T], client: Redis, patience: int) -> T:
        try:
            result = work(client)
        except Exception as error:  # a garbled answer may raise anything
            client.connection_pool.disconnect(inuse_connections=False)
            self._failed(error, patience)
            raise RedisAway from error
        self._answered()
        return result

    def _answered(self) -> None:
        with self._lock:
            came_back, self._up = not self._up, True
            self._probing = False
            self._in_a_row = 0
        if came_back:
            _log.info("redis_up")

    def _failed(self, error: Exception, patience: int) -> None:
        with self._lock:
            self._failures += 1
            self._in_a_row += 1
            if self._up and self._in_a_row < patience:
                return
            self._up = self._probing = False
            self._openings += 1
            now = self._clock()
            self._closed_until = now + PAUSE_SECONDS
            told = now - self._logged < LOG_SECONDS
            self._logged = self._logged if told else now
        if not told:
            _log.warning("redis_away", extra={"reason": _reason(error)})


def _reason(error: Exception) -> str:
    """In words of ours: what Redis, or whoever answers there, says may be anything."""
    if isinstance(error, AuthenticationError):
        return "it refuses the user or the password of --redis"
    if isinstance(error, RedisError | OSError):
        return type(error).__name__
    return f"it does not speak as Redis does ({type(error).__name__})"


def client_of(url: str, seconds: float) -> Redis:
    """A client that waits so long for a connection and for each answer, and repeats nothing."""
    options: dict[str, Any] = {
        "socket_timeout": seconds,
        "socket_connect_timeout": seconds,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "max_connections": _CONNECTIONS,
        "driver_info": None,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
    return Redis.from_url(url, **options)
