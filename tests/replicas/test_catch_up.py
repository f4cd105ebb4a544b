"""The store is listed now and then, whatever goes wrong with one listing, and seldom where it takes long."""

import logging
import threading
import time

import pytest

from adapters_store.errors import StoreUnavailable
from server.replicas import catch_up as module
from server.replicas.catch_up import CatchUp
from tests.replicas.support import Names
from tests.support.redis_server import until

SOON = 30.0


class Listed(Names):
    """Counts listings, the first of which fails; each takes `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.moments: list[float] = []
        self.called = threading.Event()

    def catch_up(self) -> None:
        self.moments.append(time.monotonic())
        self.called.set()
        threading.Event().wait(self.seconds)
        if len(self.moments) == 1:
            raise StoreUnavailable("no")


def test_it_lists_again_after_a_failure_and_ends_when_told(caplog: pytest.LogCaptureFixture) -> None:
    names = Listed()
    listing = CatchUp(names, 0.01)
    with caplog.at_level(logging.WARNING):
        listing.start()
        until(lambda: len(names.moments) > 3, SOON, "it goes on")
        listing.stop()
    assert [record.message for record in caplog.records] == ["store_not_listed"]
    until(lambda: not any(thread.name == "catch-up" for thread in threading.enumerate()), SOON, "the thread ends")


def test_a_long_listing_is_followed_by_a_longer_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REST", 10)
    names = Listed(seconds=0.05)
    listing = CatchUp(names, 0.01)
    listing.start()
    until(lambda: len(names.moments) > 2, SOON, "three listings")
    listing.stop()
    assert names.moments[2] - names.moments[1] >= 0.05 + 10 * 0.05


def test_stopping_does_not_wait_for_a_listing() -> None:
    names = Listed(seconds=60.0)
    listing = CatchUp(names, 0.0)
    listing.start()
    assert names.called.wait(SOON)
    started = time.monotonic()
    listing.stop()
    assert time.monotonic() - started < SOON
