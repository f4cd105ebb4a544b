"""Times the tokens of the answers of one call."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.request import StepOutput


@dataclass(frozen=True, slots=True)
class Times:
    """Where a timer's figures go; times in seconds."""

    first_token: Callable[[float], None]
    next_token: Callable[[float], None]
    finished: Callable[[str, float], None]  # reason, since the submit


class GenerationTimer:
    """From its making, for `count` answers."""

    def __init__(self, times: Times, count: int) -> None:
        self._times = times
        self._started = time.perf_counter()
        self._last: list[float | None] = [None] * count
        self._open = set(range(count))

    def output(self, index: int, output: StepOutput) -> None:
        now = time.perf_counter()
        if output.token_id is not None:
            last = self._last[index]
            if last is None:
                self._times.first_token(now - self._started)
            else:
                self._times.next_token(now - last)
            self._last[index] = now
        if output.finish_reason is not None:
            self._finish(index, output.finish_reason.value, now)

    def done(self) -> None:
        """Whatever has not finished by now was aborted."""
        for index in list(self._open):
            self._finish(index, "abort", time.perf_counter())

    def _finish(self, index: int, reason: str, now: float) -> None:
        if index in self._open:
            self._open.discard(index)
            self._times.finished(reason, now - self._started)
