"""How the process ends before there is a server that could act on signals, and after it has ended."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

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


def leave() -> NoReturn:
    """End the process, with 0, once all is done: the interpreter would take seconds to take torch apart."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)
