"""The keys of a running server follow the file, and outlast whatever becomes of it."""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from server.access.keeper import KeyKeeper, KeysUnreadable, keeper_of
from server.access.key import Keyring, KeyState, TenantQuota, utc_now
from server.access.key_file import KeyFile
from server.errors import InvalidKey, NotReady
from tests.support.api_keys import ApiKeys
from tests.support.redis_server import until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def write(path: Path) -> Callable[[ApiKeys], None]:
    def change(keys: ApiKeys) -> None:
        KeyFile(path).change(lambda ring: keys.ring)

    return change


def test_a_new_key_is_known_and_a_revoked_one_refused_at_the_next_look(
    path: Path, write: Callable[[ApiKeys], None]
) -> None:
    keys = ApiKeys()
    first = keys.make("generate", tenant="acme")
    write(keys)
    keeper = keeper_of(str(path))
    assert keeper.find(first).tenant == "acme"
    second = keys.make("metrics")
    write(keys)
    with pytest.raises(InvalidKey):
        keeper.find(second)
    keeper.look_again()
    assert keeper.find(second).scopes == {"metrics"}
    keys.ring = keys.ring.with_key(keys.ring.keys[0].model_copy(update={"revoked": utc_now()}))
    write(keys)
    keeper.look_again()
    with pytest.raises(InvalidKey):
        keeper.find(first)
    assert keeper.find(second).id == second[:11]
    assert keeper.state() == KeyState(1, stale=False)


def test_a_key_ends_without_any_look(path: Path, write: Callable[[ApiKeys], None]) -> None:
    now = [utc_now()]
    keys = ApiKeys()
    secret = keys.make(expires=now[0] + timedelta(seconds=10))
    write(keys)
    keeper = KeyKeeper(KeyFile(path), lambda: now[0])
    keeper.look()
    assert keeper.find(secret).id == secret[:11]
    now[0] += timedelta(seconds=10)
    with pytest.raises(InvalidKey):
        keeper.find(secret)
    assert keeper.state().active == 0


def test_a_broken_file_leaves_the_keys_as_they_were_and_says_so_once(
    path: Path, write: Callable[[ApiKeys], None], caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys()
    secret = keys.make()
    keys.ring = keys.ring.with_quota("acme", TenantQuota(adapters=1))
    write(keys)
    keeper = keeper_of(str(path))
    caplog.set_level(logging.INFO, "server.access.keeper")
    for broken in (path.unlink, lambda: path.write_bytes(b"{"), lambda: path.write_bytes(b"")):
        broken()
        for _ in range(3):
            keeper.look_again()
        assert keeper.find(secret).id == secret[:11]
        assert keeper.quota("acme") is not None
        assert keeper.state() == KeyState(1, stale=True)
    assert [record.message for record in caplog.records] == ["api_keys_not_read"] * 3
    assert secret not in caplog.text
    path.unlink()  # no change may be made to what cannot be read
    write(keys)
    keeper.look_again()
    assert keeper.state() == KeyState(1, stale=False)
    assert caplog.records[-1].message == "api_keys_read"


def test_an_unchanged_file_is_not_read_again(path: Path, write: Callable[[ApiKeys], None]) -> None:
    class Counted(KeyFile):
        reads = 0

        def read(self) -> Keyring:
            self.reads += 1
            return super().read()

    keys = ApiKeys()
    keys.make()
    write(keys)
    place = Counted(path)
    keeper = KeyKeeper(place)
    for _ in range(5):
        keeper.look_again()
    assert place.reads == 1


def test_a_server_does_not_start_without_its_file(path: Path) -> None:
    for broken in (None, b"{}x"):
        if broken is not None:
            path.write_bytes(broken)
        with pytest.raises(KeysUnreadable, match="polyrank keys add") as caught:
            keeper_of(str(path))
        assert caught.value.code == "api_keys_invalid"


def test_before_the_first_reading_nobody_is_let_in(path: Path) -> None:
    keeper = KeyKeeper(KeyFile(path))
    keeper.look_again()
    with pytest.raises(NotReady) as caught:
        keeper.find("pr_aaaaaaaa_" + "x" * 43)
    assert caught.value.code == "keys_unavailable"
    assert keeper.quota("acme") is None


def test_the_thread_sees_changes_by_itself(path: Path, write: Callable[[ApiKeys], None]) -> None:
    keys = ApiKeys()
    keys.make()
    write(keys)
    keeper = keeper_of(str(path))
    keeper.start()
    try:
        secret = keys.make("metrics")
        write(keys)
        until(lambda: _known(keeper, secret), 30, "the new key is known")
    finally:
        keeper.stop()


def _known(keeper: KeyKeeper, secret: str) -> bool:
    try:
        keeper.find(secret)
    except InvalidKey:
        return False
    return True


def test_the_clock_of_a_keeper_is_the_worlds() -> None:
    assert isinstance(utc_now(), datetime)
    assert utc_now().tzinfo is not None
