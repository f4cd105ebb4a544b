"""Registries over one store and one Redis: what one appends the others take in, and Redis may lose everything."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapters_store.errors import StoreUnavailable
from adapters_store.log import open_store
from adapters_store.registry import AdapterRegistry
from server.replicas import follower as follower_module
from server.replicas import teller as teller_module
from server.replicas.follower import ONE_BY_ONE, Follower
from server.replicas.keys import Keys
from server.replicas.link import RedisLink
from server.replicas.presence import Presence
from server.replicas.state import Member
from server.replicas.teller import Notices, Teller
from tests.adapters_store.support import BASE, factors, write
from tests.support.redis_server import RedisServer, Wire, until

KEYS = Keys("test")
SOON = 30.0  # generous; what it takes is milliseconds
RECOVERY = 30.0  # 5 s are promised; a machine that does other things gets more


@dataclass
class Peer:
    """A server without engine and HTTP."""

    registry: AdapterRegistry
    notices: Notices
    link: RedisLink
    follower: Follower
    folder: Path

    def add(self, name: str, seed: int) -> int:
        config, weights = write(self.folder / f"{name}-{seed}", factors(seed))
        return self.registry.add(name, config, weights, replace=True)[0].version

    def version(self, name: str) -> int:
        return self.registry.catalogue.newest("public", name)


Peers = Callable[[str], Peer]


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    """`peers(url)`: one more, over the same store."""
    made: list[tuple[Follower, Teller]] = []

    def start(url: str) -> Peer:
        number = len(made)
        notices, link = Notices(), RedisLink(url)
        registry = AdapterRegistry(open_store(str(tmp_path / "store")), BASE, committed=notices.announce)
        own = Member(f"id{number}", "http://h", "tiny", 0, 0, 0.0, {})
        presence = Presence(KEYS, lambda: own)
        teller, follower = Teller(link, KEYS, presence, notices), Follower(link, KEYS, registry.catalogue)
        made.append((follower, teller))
        teller.start()
        follower.start()
        return Peer(registry, notices, link, follower, tmp_path / f"peer{number}")

    yield start
    for follower, teller in made:
        follower.stop()
        teller.stop()


@pytest.fixture
def pair(redis: RedisServer, peers: Peers) -> tuple[Peer, Peer]:
    first, second = peers(redis.url), peers(redis.url)
    until(lambda: first.link.up and second.link.up, SOON, "both are connected")
    return first, second


def sees(peer: Peer, name: str, version: int) -> None:
    until(lambda: peer.version(name) == version, SOON, f"{name}@{version} is seen")


def test_uploads_replacements_deletions_and_rollbacks_are_heard(pair: tuple[Peer, Peer]) -> None:
    first, second = pair
    first.add("a", 1)
    sees(second, "a", 1)
    assert second.registry.resolve("a") == first.registry.resolve("a")
    second.add("a", 2)
    sees(first, "a", 2)
    first.registry.delete("a")
    sees(second, "a", 3)
    assert second.registry.list() == ([], None)
    second.registry.rollback("a", 1)
    sees(first, "a", 4)
    assert first.registry.resolve("a") == second.registry.resolve("a")
    until(lambda: (first.follower.changes, second.follower.changes) == (2, 2), SOON, "each heard of two")
    assert first.follower.lag < SOON
    assert len(first.notices) == len(second.notices) == 0


def test_one_that_was_not_there_learns_from_the_index(redis: RedisServer, peers: Peers) -> None:
    first, late = peers(redis.url), peers("redis://127.0.0.1:1")
    first.add("a", 1)
    with redis.client() as client:
        until(lambda: client.zscore(KEYS.index, "public/a") == 1, SOON, "the index has it")
        client.delete(KEYS.changes)  # as if the stream had been trimmed since
    assert late.version("a") == 0
    with caught_up(late, redis):
        sees(late, "a", 1)


@contextmanager
def caught_up(peer: Peer, redis: RedisServer) -> Iterator[None]:
    link = RedisLink(redis.url)
    follower = Follower(link, KEYS, peer.registry.catalogue)
    follower.start()
    yield
    follower.stop()
    link.close()


@pytest.mark.parametrize("fault", ["empty", "frozen", "cut"])
def test_after_an_outage_everybody_knows_everything(fault: str, redis: RedisServer, peers: Peers) -> None:
    with Wire(redis.port) as wire:
        first, second = peers(wire.url), peers(wire.url)
        first.add("before", 1)
        sees(second, "before", 1)
        if fault == "empty":
            redis.kill()
        elif fault == "frozen":
            redis.freeze()
        else:
            wire.garbage = b"!\x00"
        first.add("during", 1)
        second.add("before", 2)
        until(lambda: not first.link.up and not second.link.up, SOON, "both have noticed")
        first.add("during", 2)
        if fault == "empty":
            redis.start()
        elif fault == "frozen":
            redis.thaw()
        wire.garbage = None
        until(lambda: (second.version("during"), first.version("before")) == (2, 2), RECOVERY, "the outage is made up")
        with redis.client() as client:
            until(lambda: client.zscore(KEYS.index, "public/before") == 2, SOON, "the index is whole again")
            assert client.zscore(KEYS.index, "public/during") == 2


def test_an_emptied_index_is_filled_again_without_an_outage(
    redis: RedisServer, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "COMPARE_SECONDS", 0.1)
    first, second = peers(redis.url), peers(redis.url)
    first.add("a", 1)
    sees(second, "a", 1)
    with redis.client() as client:
        client.flushall()
        until(lambda: client.zscore(KEYS.index, "public/a") == 1, SOON, "the index is filled again")
        second.add("a", 2)
    sees(first, "a", 2)


def test_many_changes_at_once_are_one_listing(
    redis: RedisServer, pair: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pair
    redis.freeze()
    for number in range(ONE_BY_ONE + 2):
        first.add(f"n{number}", number)
    listed: list[int] = []
    catch_up = second.registry.catalogue.catch_up

    def counted() -> None:
        listed.append(1)
        catch_up()

    monkeypatch.setattr(second.registry.catalogue, "catch_up", counted)
    redis.thaw()
    for number in range(ONE_BY_ONE + 2):
        sees(second, f"n{number}", 1)
    assert listed


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "public/../../etc", "version": "1"},
        {"name": "public/UPPER", "version": "1"},
        {"name": "a", "version": "1"},
        {"name": "public/a/b", "version": "1"},
        {"name": "public/a", "version": "-1"},
        {"name": "public/a", "version": "9" * 30},
        {"name": b"\xff\xfe", "version": b"\x00"},
        {"other": "thing"},
        {"look": "1"},
    ],
)
def test_whatever_is_in_the_stream_and_the_index_does_no_harm(
    fields: dict[str, str | bytes], redis: RedisServer, pair: tuple[Peer, Peer]
) -> None:
    first, second = pair
    with redis.client() as client:
        client.xadd(KEYS.changes, fields)
        client.zadd(KEYS.index, {fields.get("name", "x"): float("inf"), "public/not-there": 7, b"\xff/\x00": 3.5})
    first.add("after", 1)
    sees(second, "after", 1)
    assert second.link.up
    assert [info.name for info in second.registry.list()[0]] == ["after"]


def test_what_a_failing_store_hid_is_read_later(pair: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair
    failing = [True]
    refresh = second.registry.catalogue.refresh_name

    def refresh_name(tenant: str, name: str) -> bool:
        if failing[0]:
            failing[0] = False
            raise StoreUnavailable("no")
        return refresh(tenant, name)

    monkeypatch.setattr(second.registry.catalogue, "refresh_name", refresh_name)
    first.add("a", 1)
    sees(second, "a", 1)
    assert not failing[0]


def test_notices_are_bounded_and_kept_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teller_module, "MAX_WAITING", 5)
    monkeypatch.setattr(teller_module, "BATCH", 3)
    notices = Notices()
    for version in range(1, 8):
        notices.announce("public", "a", version)
    assert len(notices) == 5
    batch = notices.first()
    assert [change.version for change in batch] == [3, 4, 5]
    assert notices.first() == batch, "they stay until they are sent"
    notices.sent(batch)
    assert [change.version for change in notices.first()] == [6, 7]
    assert not notices.wait(0)
    notices.announce("public", "a", 8)
    assert notices.wait(0)


def test_what_is_left_is_sent_at_the_end(redis: RedisServer, tmp_path: Path) -> None:
    notices, link = Notices(), RedisLink(redis.url)
    own = Member("id", "http://h", "tiny", 0, 0, 0.0, {})
    teller = Teller(link, KEYS, Presence(KEYS, lambda: own), notices)
    teller.start()
    with redis.client() as client:
        until(lambda: client.exists(KEYS.member("id")), SOON, "it has told of itself")
        notices.announce("public", "last", 3)
        teller.stop()
        assert client.zscore(KEYS.index, "public/last") == 3
        assert client.xlen(KEYS.changes) == 1
        assert not client.exists(KEYS.member("id"))


def test_stores_have_keys_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    same = {Keys.of_store(url) for url in (str(tmp_path / "s"), f"file://{tmp_path}/s", "s", f"{tmp_path}/x/../s/")}
    assert len(same) == 1
    assert Keys.of_store("s3://bucket/a/") == Keys.of_store("s3://bucket/a")
    assert len({Keys.of_store(url).index for url in ("s3://bucket/a", "s3://bucket/b", "gs://bucket/a", "a")}) == 4


def test_what_was_forgotten_meanwhile_costs_no_other_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teller_module, "MAX_WAITING", 5)
    monkeypatch.setattr(teller_module, "BATCH", 3)
    notices = Notices()
    for version in range(1, 6):
        notices.announce("public", "a", version)
    batch = notices.first()
    for version in (6, 7):
        notices.announce("public", "a", version)  # 1 and 2 of the batch are pushed out
    notices.sent(batch)
    assert [change.version for change in notices.first()] == [4, 5, 6]
