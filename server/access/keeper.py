"""The keys of a running server: read again whenever they have changed where they are kept."""

import logging
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Protocol

from adapters_store.errors import CodedError
from adapters_store.quota import Quota
from server.access.key import Key, Keyring, KeysInvalid, KeyState, KeyTable, utc_now
from server.access.key_file import KeyFile
from server.access.key_redis import KeyRedis
from server.errors import NotReady

LOOK_SECONDS = 0.5  # a change is seen within this, and the time that reading takes
_log = logging.getLogger(__name__)


class KeysUnreadable(CodedError):
    """The file of keys is not there or not right, and the server must not start without (500, never answered)."""

    code = "api_keys_invalid"


class KeyPlace(Protocol):
    """Where keys are kept. Blocking; one thread at a time, `change` besides."""

    def read(self) -> Keyring: ...
    def stamp(self) -> object: ...
    def change(self, edit: Callable[[Keyring], Keyring]) -> Keyring: ...
    def close(self) -> None: ...


def place_of(address: str) -> KeyPlace:
    """A file, or a Redis by its URL."""
    if address.startswith(("redis://", "rediss://", "unix://")):
        return KeyRedis(address)
    return KeyFile(Path(address).expanduser())


def keeper_of(address: str) -> "KeyKeeper":
    """The keys at an address. Raises KeysUnreadable for a file; a Redis may come later."""
    place = place_of(address)
    keeper = KeyKeeper(place)
    if isinstance(place, KeyRedis):
        keeper.look_again()
        return keeper
    try:
        keeper.look()
    except KeysInvalid as error:
        text = f"--api-keys {address}: {error}. `polyrank keys add` makes the file and a key."
        raise KeysUnreadable(text) from None
    return keeper


class KeyKeeper:
    """Look-ups from any thread; `start` and `stop` once. A place that cannot be read leaves the keys as they were."""

    def __init__(self, place: KeyPlace, clock: Callable[[], datetime] = utc_now) -> None:
        self._place = place
        self._clock = clock
        self._table: KeyTable | None = None
        self._stamp: object = None
        self._trouble: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="api-keys", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self._place.close()

    def find(self, secret: str) -> Key:
        """The active key that the text is. Raises InvalidKey; NotReady while there are no keys to compare with."""
        if self._table is None:
            raise NotReady("The API keys cannot be read yet. Try again soon.", code="keys_unavailable")
        return self._table.find(secret, self._clock())

    def quota(self, tenant: str) -> Quota | None:
        return self._table.quota(tenant) if self._table is not None else None

    def state(self) -> KeyState:
        active = self._table.active(self._clock()) if self._table is not None else 0
        return KeyState(active, self._trouble is not None)

    def look(self) -> None:
        """Reads the keys if they have changed, or could not be read before. Raises KeysInvalid."""
        stamp = self._place.stamp()
        if stamp is not None and stamp == self._stamp and self._trouble is None:
            return
        self._table = KeyTable(self._place.read())
        self._stamp = stamp  # taken before: what was changed meanwhile is read again

    def look_again(self) -> None:
        """As `look`; what is wrong goes to the log, once."""
        try:
            self.look()
        except KeysInvalid as error:
            if str(error) != self._trouble:
                _log.error("api_keys_not_read", extra={"reason": str(error), "kept": self.state().active})
            self._trouble = str(error)
            return
        if self._trouble is not None:
            _log.info("api_keys_read", extra={"active": self.state().active})
        self._trouble = None

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.look_again()
