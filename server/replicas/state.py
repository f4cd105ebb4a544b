"""What is known of the link to Redis and of the servers beside this one: plain values for the API and the metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinkState:
    """The link to Redis. up: the last call was answered and none has failed since; calls, failures: since the start."""

    configured: bool = False
    up: bool = False
    calls: int = 0
    failures: int = 0
    openings: int = 0  # of the breaker: how often the link was given up for a second


@dataclass(frozen=True, slots=True)
class SharingStats:
    """Counts since the start. changes: to names, by other servers, that Redis brought here; lag: how old the last
    notice was when it was read, in seconds of Redis's own clock; waiting: notices not sent yet; checks: of single names
    against the store; failed_checks: those that the store did not answer in time.
    """

    changes: int = 0
    lag: float = 0.0
    waiting: int = 0
    checks: int = 0
    failed_checks: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """A server as it told of itself. resident: place (`resident`, `loading`, ...) -> digests there, at most 1000 each;
    age: seconds since this server heard of it, 0 for itself.
    """

    id: str
    address: str
    model: str
    running: int
    waiting: int
    kv_usage: float
    resident: Mapping[str, Sequence[str]]
    age: float = 0.0
