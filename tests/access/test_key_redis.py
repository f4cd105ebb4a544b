"""Keys in a real Redis, which may be emptied, killed or frozen while servers use them."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.access.keeper import KeyKeeper, keeper_of
from server.access.key import Keyring, KeysInvalid, KeyState, TenantQuota
from server.access.key_redis import KEY, KeyRedis
from server.errors import InvalidKey, NotReady
from tests.support.api_keys import ApiKeys
from tests.support.redis_server import RedisServer, require_redis, until

NO_SCRIPTS = ("--user", "default", "on", "nopass", "~*", "&*", "+@all", "-@scripting")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    require_redis()
    with RedisServer(tmp_path, NO_SCRIPTS) as server:
        yield server


@pytest.fixture
def place(redis: RedisServer) -> Iterator[KeyRedis]:
    made = KeyRedis(redis.url)
    yield made
    made.close()


def test_keys_are_changed_and_read(place: KeyRedis, redis: RedisServer) -> None:
    with pytest.raises(KeysInvalid, match="holds no keys"):
        place.read()
    keys = ApiKeys()
    secret = keys.make("generate", tenant="acme")
    stamp = place.stamp()
    assert place.change(lambda ring: keys.ring) == place.read() == keys.ring
    assert place.stamp() != stamp
    with redis.client() as client:
        assert secret.encode() not in b"".join(client.hgetall(KEY).values())


def test_several_change_them_at_once_and_none_is_lost(redis: RedisServer) -> None:
    def work(writer: int) -> None:
        place = KeyRedis(redis.url)
        for number in range(20):
            name = f"w{writer}-{number}"
            place.change(lambda ring, name=name: ring.with_quota(name, TenantQuota()))  # type: ignore[misc]
        place.close()

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    place = KeyRedis(redis.url)
    assert len(place.read().quotas) == 80
    place.close()


def test_a_change_that_fails_changes_nothing(place: KeyRedis, redis: RedisServer) -> None:
    place.change(lambda ring: ring.with_quota("acme", TenantQuota()))

    def refuse(ring: Keyring) -> Keyring:
        raise LookupError

    with pytest.raises(LookupError):
        place.change(refuse)
    assert place.read().quotas.keys() == {"acme"}
    with redis.client() as client:
        client.hset(KEY, "keys", "{")
    with pytest.raises(KeysInvalid):
        place.change(lambda ring: ring)
    redis.kill()
    with pytest.raises(ConnectionError, match="Redis did not do it"):
        place.change(lambda ring: ring)


def looks(keeper: KeyKeeper, stale: bool) -> bool:
    keeper.look_again()
    return keeper.state().stale is stale


def test_the_last_keys_go_on_while_redis_is_away_or_empty(redis: RedisServer) -> None:
    keys = ApiKeys()
    first = keys.make()
    place = KeyRedis(redis.url)
    place.change(lambda ring: keys.ring)
    keeper = keeper_of(redis.url)
    assert keeper.state() == KeyState(1, stale=False)
    redis.freeze()
    try:
        until(lambda: looks(keeper, stale=True), 30, "a frozen Redis is noticed")
        assert keeper.find(first).id == first[:11]
    finally:
        redis.thaw()
    redis.kill()
    until(lambda: looks(keeper, stale=True), 30, "a dead Redis is noticed")
    assert keeper.find(first).id == first[:11]
    redis.start()  # empty
    keeper.look_again()
    assert keeper.find(first).id == first[:11]
    second = keys.make()
    until(lambda: _change(place, keys), 30, "the new Redis takes keys")
    until(lambda: looks(keeper, stale=False), 30, "and they are read")
    assert keeper.find(second).id == second[:11]
    keys.ring = keys.ring.with_key(keys.ring.keys[0].model_copy(update={"revoked": keys.ring.keys[0].created}))
    place.change(lambda ring: keys.ring)
    keeper.look_again()
    with pytest.raises(InvalidKey):
        keeper.find(first)
    place.close()


def _change(place: KeyRedis, keys: ApiKeys) -> bool:
    try:
        place.change(lambda ring: keys.ring)
    except ConnectionError:
        return False
    return True


def test_a_server_may_start_before_its_redis(redis: RedisServer) -> None:
    redis.kill()
    keeper = keeper_of(redis.url)
    with pytest.raises(NotReady):
        keeper.find("pr_x")
    redis.start()
    keys = ApiKeys()
    secret = keys.make()
    place = KeyRedis(redis.url)
    place.change(lambda ring: keys.ring)
    until(lambda: looks(keeper, stale=False), 30, "keys are read")
    assert keeper.find(secret).id == secret[:11]
    place.close()
