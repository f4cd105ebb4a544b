"""A live server for real clients: once over the fake engine, and once the real thing in a process of its own."""

from collections.abc import Iterator

import pytest

from tests.clients.live import LiveServer, fake_server, real_server


@pytest.fixture(scope="package")
def real_live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The one process that all tests here share."""
    with real_server(tmp_path_factory.mktemp("live")) as server:
        yield server


@pytest.fixture(scope="package", params=["fake engine", "real engine"])
def live_server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    if request.param == "real engine":
        real: LiveServer = request.getfixturevalue("real_live")
        yield real
    else:
        with fake_server() as server:
            yield server
