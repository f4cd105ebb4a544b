"""What each server tells the others of itself once a second, under a key that expires, and what it reads of them."""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

from redis import Redis

from server.replicas.keys import Keys
from server.replicas.state import Member

EXPIRY_SECONDS = 5  # a server that has told nothing for so long is gone
MAX_MEMBERS = 1000
_MOST = 1 << 53  # of a count that another server tells: what JSON's readers hold exactly
_TYPES: Mapping[str, tuple[type, ...]] = {
    "id": (str,),
    "address": (str,),
    "model": (str,),
    "running": (int,),
    "waiting": (int,),
    "kv_usage": (int, float),
}


class Presence:
    """Thread-safe. `tell` belongs in RedisLink.call."""

    def __init__(self, keys: Keys, own: Callable[[], Member], clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._own = own
        self._clock = clock
        self._lock = threading.Lock()
        self._others: dict[str, tuple[Member, float]] = {}  # id -> as it told of itself, and when that was read

    def tell(self, redis: Redis) -> None:
        """Write this server, read the others; ids of those that have expired are cleared away."""
        own = self._own()
        told = json.dumps({key: value for key, value in asdict(own).items() if key != "age"})
        with redis.pipeline(transaction=True) as batch:
            batch.set(self._keys.member(own.id), told, ex=EXPIRY_SECONDS)
            batch.sadd(self._keys.members, own.id)
            batch.smembers(self._keys.members)
            found: set[bytes] = batch.execute()[-1]
        ids = sorted(each for each in found if each != own.id.encode())[:MAX_MEMBERS]
        if not ids:
            self._take({})
            return
        texts = cast(list[bytes | None], redis.mget([self._keys.member(each.decode("latin-1")) for each in ids]))
        if gone := [each for each, text in zip(ids, texts, strict=True) if text is None]:
            redis.srem(self._keys.members, *gone)
        members = (_read(text) for text in texts if text is not None)
        self._take({member.id: member for member in members if member is not None})

    def leave(self, redis: Redis) -> None:
        """The server ends."""
        identity = self._own().id
        redis.srem(self._keys.members, identity)
        redis.delete(self._keys.member(identity))

    def members(self) -> list[Member]:
        """This server first, then the others heard of in the last seconds, by id."""
        now = self._clock()
        with self._lock:
            others = [replace(member, age=now - seen) for member, seen in self._others.values()]
        return [self._own(), *sorted((each for each in others if each.age <= EXPIRY_SECONDS), key=lambda each: each.id)]

    def count(self) -> int:
        """Servers alive, this one included."""
        oldest = self._clock() - EXPIRY_SECONDS
        with self._lock:
            return 1 + sum(seen >= oldest for _, seen in self._others.values())

    def _take(self, members: Mapping[str, Member]) -> None:
        now = self._clock()
        with self._lock:
            self._others = {identity: (member, now) for identity, member in members.items()}


def _read(text: bytes) -> Member | None:
    """Redis is no more trusted than any other input: what is not of the right form is left out."""
    try:
        fields: dict[str, Any] = json.loads(text)
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()  # no NaN and no half characters
        if any(not isinstance(fields[key], kind) for key, kind in _TYPES.items()):
            return None
        if any(isinstance(value, int) and not 0 <= value <= _MOST for value in fields.values()):
            return None
        resident: dict[str, Sequence[str]] = {}
        for place, digests in fields["resident"].items():
            if not isinstance(digests, list) or not all(isinstance(digest, str) for digest in digests):
                return None
            resident[place] = digests
        return Member(**{key: fields[key] for key in _TYPES}, resident=resident)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
