"""uvicorn with a drain before its shutdown, as that one begins by closing the listening socket."""

import logging
import os
import queue
import signal
import threading
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.api.drain import Drain

IDLE_TICKS = 2  # in a row; between them the loop has read what had arrived before the signal
LAST_WORDS_SECONDS = 1  # for requests that are cut off at the end to say so
END_SECONDS = 1.8  # from the deadline, or from a second signal, to the end of the process whatever hangs
TIDY_SECONDS = 10.0  # more than these are not spent on what is left when no answer is owed any more
_log = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """Ends once it was told to and either owes no answer or has waited `drain_seconds`; at most 2 s later it is gone.

    A second signal ends the waiting; a third one the process, however stuck it may be.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, drain_seconds: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_seconds = drain_seconds
        self._deadline = float("inf")
        self._idle_ticks = 0
        self._last = _LastResort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the system between any two instructions: only notes what was asked for."""
        if not self._drain.active:
            self._deadline = time.monotonic() + self._drain_seconds
            self._drain.active = True
            self._last.end_by(self._deadline + END_SECONDS)
        else:
            self._deadline = 0.0
            self._last.end_by(time.monotonic() + END_SECONDS)
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_DFL)

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s: whether to end now."""
        if await super().on_tick(counter):
            return True
        self._idle_ticks = self._idle_ticks + 1 if self._drain.active and not self._drain.running else 0
        if time.monotonic() < self._deadline:
            ends = self._idle_ticks >= IDLE_TICKS
            if ends:
                self._last.end_by(time.monotonic() + TIDY_SECONDS)
            return ends
        for task in self.server_state.tasks:
            task.cancel()
        return True


class _LastResort:
    """A thread that ends the process at the earliest of the times it is given, should nothing else have by then.

    What would have been tidied up is put right at the next start: nothing that was acknowledged is only in memory.
    """

    def __init__(self) -> None:
        self._times: queue.SimpleQueue[float] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="last-resort", daemon=True).start()

    def end_by(self, when: float) -> None:
        """when: monotonic. Signal handlers may call it: this kind of queue can be put to at any moment."""
        self._times.put(when)

    def _run(self) -> None:
        when = self._times.get()
        while (left := when - time.monotonic()) > 0:
            try:
                when = min(when, self._times.get(timeout=left))
            except queue.Empty:
                break
        _log.error("ended_without_waiting", extra={"note": "something did not stop in time"})
        os._exit(0)


def serve(api: FastAPI, drain: Drain, host: str, port: int, drain_seconds: float) -> None:
    """Serve until told to stop. One that could not start raises SystemExit with 1 instead of uvicorn's 3."""
    config = uvicorn.Config(
        api,
        host=host,
        port=port,
        log_config=None,
        ws="none",  # there is no route for one
        access_log=False,
        timeout_graceful_shutdown=LAST_WORDS_SECONDS,
    )
    try:
        DrainingServer(config, drain, drain_seconds).run()
    except SystemExit as end:
        raise SystemExit(1 if end.code else 0) from None
