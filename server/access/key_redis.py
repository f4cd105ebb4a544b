"""Keys in Redis, for servers that share no disk. Whoever may write to it may make keys."""

import uuid
from collections.abc import Callable
from functools import partial
from typing import cast

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError

from server.access.key import Keyring, KeysInvalid, decode, encode
from server.replicas.link import TIMEOUT_SECONDS, RedisAway, RedisLink, client_of

KEY = "polyrank:api-keys"  # hash: `keys`, the same JSON as in a file, and `revision`, another one after each change
_PATIENCE_SECONDS = 5 * TIMEOUT_SECONDS  # of a command that a person waits for


class KeyRedis:
    """Without scripts: an ACL may forbid them."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._link = RedisLink(url)

    def read(self) -> Keyring:
        """Raises KeysInvalid, also where Redis is away."""
        try:
            data = self._link.call(partial(_field, "keys"))
        except RedisAway:
            raise KeysInvalid("Redis does not answer") from None
        if data is None:
            raise KeysInvalid("Redis holds no keys: it is new, or was emptied")
        return decode(data)

    def stamp(self) -> object:
        """Differs once the keys have been changed; None while Redis is away. Cheap."""
        try:
            return self._link.call(partial(_field, "revision"))
        except RedisAway:
            return None

    def change(self, edit: Callable[[Keyring], Keyring]) -> Keyring:
        """As `KeyFile.change`. Raises ConnectionError, a kind of OSError, where Redis does not do it."""
        made: list[Keyring] = []

        def work(batch: Pipeline) -> None:
            data = cast(bytes | None, batch.hget(KEY, "keys"))
            made.append(edit(Keyring() if data is None else decode(data)))
            batch.multi()
            batch.hset(KEY, mapping={"keys": encode(made[-1]), "revision": uuid.uuid4().hex})

        client = client_of(self._url, _PATIENCE_SECONDS)
        try:
            client.transaction(work, KEY)  # again if somebody else was quicker
        except RedisError as error:
            raise ConnectionError(f"Redis did not do it ({type(error).__name__}); look what is there now") from None
        finally:
            client.close()
        return made[-1]

    def close(self) -> None:
        self._link.close()


def _field(name: str, redis: Redis) -> bytes | None:
    return cast(bytes | None, redis.hget(KEY, name))
