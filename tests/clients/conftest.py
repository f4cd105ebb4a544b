"""A live server for real clients: once over the fake engine, and once the real thing in a process of its own."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from tests.clients.live import LiveServer, fake_server, real_server


@pytest.fixture(scope="session", params=["fake engine", "real engine"])
def live_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    start: AbstractContextManager[LiveServer]
    start = fake_server() if request.param == "fake engine" else real_server(tmp_path_factory.mktemp("live"))
    with start as server:
        yield server
