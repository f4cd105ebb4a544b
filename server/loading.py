"""Signals before there is a server that could act on them."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # as shells say it of Ctrl-C
_log = logging.getLogger(__name__)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """While the block runs, SIGTERM and SIGINT end the process with a line in the log.

    At once, not by an exception: that would wait for the threads that compile kernels, half a minute each. A compiler
    that is left behind ends by itself, and no library gets its final name unless it is whole.
    """
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> None:
    _log.info("stopped_while_loading", extra={"signal": signal.Signals(number).name})
    os._exit(INTERRUPTED if number == signal.SIGINT else 0)
