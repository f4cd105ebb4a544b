"""uvicorn with a drain before its shutdown, as that one begins by closing the listening socket."""

import signal
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.api.drain import Drain

IDLE_TICKS = 2  # in a row; between them the loop has read what had arrived before the signal
LAST_WORDS_SECONDS = 2  # for requests that are cut off at the end to say so


class DrainingServer(uvicorn.Server):
    """Ends once it was told to and either owes no answer or has waited `drain_seconds`.

    A second signal ends the waiting; a third one the process, however stuck it may be.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, drain_seconds: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_seconds = drain_seconds
        self._deadline = float("inf")
        self._idle_ticks = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the system between any two instructions: only notes what was asked for."""
        if not self._drain.active:
            self._deadline = time.monotonic() + self._drain_seconds
            self._drain.active = True
        else:
            self._deadline = 0.0
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_DFL)

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s: whether to end now."""
        if await super().on_tick(counter):
            return True
        self._idle_ticks = self._idle_ticks + 1 if self._drain.active and not self._drain.running else 0
        if time.monotonic() < self._deadline:
            return self._idle_ticks >= IDLE_TICKS
        for task in self.server_state.tasks:
            task.cancel()
        return True


def serve(api: FastAPI, drain: Drain, host: str, port: int, drain_seconds: float) -> None:
    """Serve until told to stop. One that could not start raises SystemExit with 1 instead of uvicorn's 3."""
    config = uvicorn.Config(
        api,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=LAST_WORDS_SECONDS,
    )
    try:
        DrainingServer(config, drain, drain_seconds).run()
    except SystemExit as end:
        raise SystemExit(1 if end.code else 0) from None
