"""What servers tell of themselves is read by the others, expires, and is believed only in the right form."""

import json
import math
from dataclasses import asdict

import pytest

from server.replicas.keys import Keys
from server.replicas.link import RedisLink
from server.replicas.presence import EXPIRY_SECONDS, Presence
from server.replicas.service import MAX_DIGESTS, placed
from server.replicas.state import Member
from tests.support.redis_server import RedisServer

KEYS = Keys("test")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def member(number: int, running: int = 0) -> Member:
    return Member(f"id{number}", f"http://h{number}", "tiny", running, 0, 0.5, {"resident": ["d"]})


@pytest.fixture
def link(redis: RedisServer) -> RedisLink:
    return RedisLink(redis.url)


def test_servers_know_each_other_and_their_load(link: RedisLink) -> None:
    clock, load = Clock(), [0]
    first = Presence(KEYS, lambda: member(1, load[0]), clock)
    second = Presence(KEYS, lambda: member(2), clock)
    assert first.members() == [member(1)]
    load[0] = 7
    for each in (first, second, first):
        link.call(each.tell)
    assert second.members() == [member(2), member(1, 7)]
    assert first.members() == [member(1, 7), member(2)]
    assert first.count() == second.count() == 2
    clock.now += 1.5
    assert first.members()[1].age == 1.5


def test_who_is_not_heard_of_is_gone(link: RedisLink) -> None:
    clock = Clock()
    first, second = Presence(KEYS, lambda: member(1), clock), Presence(KEYS, lambda: member(2), clock)
    link.call(second.tell)
    link.call(first.tell)
    assert first.count() == 2
    clock.now += EXPIRY_SECONDS + 0.1  # nothing is read of Redis either
    assert first.count() == 1
    assert first.members() == [member(1)]


def test_an_expired_server_is_cleared_away_and_one_that_leaves_at_once(redis: RedisServer, link: RedisLink) -> None:
    first, second = Presence(KEYS, lambda: member(1)), Presence(KEYS, lambda: member(2))
    link.call(second.tell)
    with redis.client() as client:
        assert 0 < client.ttl(KEYS.member("id2")) <= EXPIRY_SECONDS
        client.delete(KEYS.member("id2"))  # as it expires
        link.call(first.tell)
        assert first.count() == 1
        assert client.smembers(KEYS.members) == {b"id1"}
        link.call(second.tell)
        link.call(first.tell)
        assert first.count() == 2
        link.call(second.leave)
        assert not client.exists(KEYS.member("id2"))
    link.call(first.tell)
    assert first.members() == [member(1)]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"[" * 100_000,
        json.dumps({"id": "id9"}).encode(),
        json.dumps({**asdict(member(9)), "running": "many"}).encode(),
        json.dumps({**asdict(member(9)), "resident": 5}).encode(),
        json.dumps({**asdict(member(9)), "resident": {"a": "bcd"}}).encode(),
        json.dumps({**asdict(member(9)), "address": "\ud800"}).encode(),
        json.dumps({**asdict(member(9)), "resident": {"\udfff": ["d"]}}).encode(),
        json.dumps({**asdict(member(9)), "kv_usage": math.nan}).encode(),
        json.dumps({**asdict(member(9)), "running": 10**400}).encode(),
        json.dumps({**asdict(member(9)), "waiting": -1}).encode(),
        json.dumps({"id": "id9", "address": 1, "model": "", "running": 0, "waiting": 0, "kv_usage": 0}).encode(),
    ],
)
def test_what_is_not_of_the_right_form_is_left_out(text: bytes, redis: RedisServer, link: RedisLink) -> None:
    first = Presence(KEYS, lambda: member(1))
    with redis.client() as client:
        client.sadd(KEYS.members, "id9", b"\xff\x00")
        client.set(KEYS.member("id9"), text)
    link.call(first.tell)
    assert first.members() == [member(1)]


def test_digests_are_told_by_their_place() -> None:
    places = {"a": "resident", "b": "absent", "c": "loading", "d": "resident"}
    assert placed(sorted(places), places.__getitem__) == {"resident": ["a", "d"], "loading": ["c"]}
    many = placed([str(number) for number in range(MAX_DIGESTS + 5)], lambda _: "host")
    assert len(many["host"]) == MAX_DIGESTS
