"""Whether the event loop gets on: a callback that blocks it stops every answer, `/health` included."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable

from server.stacks import place_of

PERIOD_SECONDS = 1.0
BLOCKED_SECONDS = 5.0

log = logging.getLogger(__name__)


class LoopWatch:
    """A thread that asks the loop for a sign of life once a period, and tells how late it came.

    told: takes the seconds, on that thread. A loop that gives no sign for `blocked_seconds` is logged once with the
    place where it stands; from outside it is seen by probes that get no answer.
    """

    def __init__(
        self,
        told: Callable[[float], None],
        period_seconds: float = PERIOD_SECONDS,
        blocked_seconds: float = BLOCKED_SECONDS,
    ) -> None:
        self._told = told
        self._period = period_seconds
        self._blocked = blocked_seconds
        self._stopping = threading.Event()

    def start(self) -> None:
        """To be called on the loop."""
        facts = (asyncio.get_running_loop(), threading.get_ident())
        threading.Thread(target=self._run, args=facts, name="loop-watch", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        while not self._stopping.wait(self._period):
            answered, asked = threading.Event(), time.monotonic()
            try:
                loop.call_soon_threadsafe(answered.set)
            except RuntimeError:  # closed
                return
            if not answered.wait(self._blocked):
                log.critical("event_loop_blocked", extra={"seconds": self._blocked, "at": place_of(thread)})
                while not answered.wait(self._period):
                    if self._stopping.is_set():
                        return
            self._told(time.monotonic() - asked)
