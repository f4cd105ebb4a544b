"""A blocked event loop is told of, and where it stands."""

import asyncio
import logging
import threading

import pytest

from server.loop_watch import LoopWatch
from server.metrics import Metrics


async def test_a_blocked_loop_is_measured_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    lags: list[float] = []
    told, seen = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.set()

    def lag(seconds: float) -> None:
        lags.append(seconds)
        loop.call_soon_threadsafe(seen.set)

    logger, handler = logging.getLogger("server.loop_watch"), Handler()
    logger.addHandler(handler)
    watch = LoopWatch(lag, period_seconds=0.01, blocked_seconds=0.02)
    watch.start()
    try:
        await seen.wait()
        seen.clear()
        assert told.wait(60)  # on the loop: nothing else runs until the watch has noticed
        await seen.wait()
    finally:
        watch.stop()
        logger.removeHandler(handler)
    assert max(lags) >= 0.02
    [record] = [record for record in caplog.records if record.getMessage() == "event_loop_blocked"]
    assert "test_a_blocked_loop_is_measured_and_logged_once (test_loop_watch.py:" in record.__dict__["at"]


def test_lags_are_exported() -> None:
    metrics = Metrics()
    metrics.loop_lag(0.3)
    assert b'polyrank_event_loop_lag_seconds_bucket{le="0.5"} 1.0' in metrics.render()
