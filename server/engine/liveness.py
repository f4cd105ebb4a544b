"""Whether the engine gets on: for how long its thread has been at one thing while there is work."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable

from server.engine.core import EngineCore
from server.engine.limits import STUCK_SECONDS
from server.stacks import place_of

READY_SHARE = 0.25  # of the time after which the engine counts as stuck
FIRST_STEP = 5  # times as long: kernels may be compiled in it
WATCH_SECONDS = 1.0

log = logging.getLogger(__name__)


class Liveness:
    """Any thread may ask. Nothing counts while all requests wait for adapters: a load may take its time.

    `waiting_since`, monotonic, is kept by the engine's front: since when a command has not been carried out, or None.
    """

    def __init__(self, core: EngineCore, stuck_seconds: float = STUCK_SECONDS) -> None:
        self.waiting_since: float | None = None
        self._core = core
        self._stuck_seconds = stuck_seconds

    def seconds(self) -> float:
        """Since the last step ended or the last command was carried out; 0 while there is nothing to do."""
        since = self.waiting_since
        return max(self._core.seconds_since_step(), 0.0 if since is None else time.monotonic() - since)

    def stuck(self) -> bool:
        """So long that only a restart helps."""
        return self.seconds() >= self._patience()

    def slow(self) -> bool:
        """So long that new requests are better off elsewhere."""
        return self.seconds() >= READY_SHARE * self._patience()

    async def watch(self, thread: threading.Thread, give_up: Callable[[], None]) -> None:
        """While the engine is stuck, call `give_up`, and say once in the log where its thread stands."""
        told = False
        while thread.is_alive():
            await asyncio.sleep(min(WATCH_SECONDS, self._stuck_seconds / 10))
            if not self.stuck():
                told = False
                continue
            if not told:
                facts = {"seconds": round(self.seconds(), 1), "at": place_of(thread.ident)}
                log.critical("engine_stuck", extra=facts)
            told = True
            give_up()

    def _patience(self) -> float:
        return self._stuck_seconds * (1 if self._core.stats.steps_total else FIRST_STEP)
