"""How many requests a client may make in how long, and how many it has made."""

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
MAX_CLIENTS = 10_000
_FORM = re.compile(r"([1-9][0-9]{0,8})\s*/\s*(second|minute|hour|day)")


@dataclass(frozen=True, slots=True)
class Rate:
    """limit: requests in any `window` seconds."""

    limit: int
    window: int

    @classmethod
    def parse(cls, text: str) -> "Rate":
        """`60/minute`. Raises ValueError."""
        found = _FORM.fullmatch(text.strip().lower())
        if found is None:
            raise ValueError("must be a number, a slash and second, minute, hour or day, such as 60/minute")
        return cls(int(found[1]), SECONDS[found[2]])

    def index(self, now: float) -> int:
        """Number of the window that `now`, in seconds since 1970, falls into."""
        return int(now // self.window)

    def wait(self, previous: int, current: int, now: float) -> float:
        """Seconds until one more request fits, 0 for now.

        previous, current: requests of the last whole window and of this one so far. Those of the last are taken to
        have come evenly: of them the share counts that lies less than a window ago.
        """
        gone = now / self.window - self.index(now)
        room = self.limit - 1 - current
        if room >= 0:
            needed = 1 - room / previous if previous > room else 0.0
            return max(0.0, needed - gone) * self.window
        needed = 1 - (self.limit - 1) / current  # of the window after this one
        return (1 - gone + needed) * self.window


class LocalCounts:
    """What clients have asked of this server alone. Used from one thread; the clients seen last are remembered."""

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.time) -> None:
        self._rate = rate
        self._clock = clock
        self._counts: OrderedDict[str, tuple[int, int, int]] = OrderedDict()  # window, requests in it and in the last

    def wait(self, client: str, share: int) -> float:
        """Seconds until the client may ask again, if `share` servers have the limit between them."""
        now = self._clock()
        _, current, previous = self._at(client, now)
        rate = Rate(max(1, self._rate.limit // share), self._rate.window)
        return rate.wait(previous, current, now)

    def add(self, client: str) -> None:
        window, current, previous = self._at(client, self._clock())
        self._counts[client] = (window, current + 1, previous)
        self._counts.move_to_end(client)
        if len(self._counts) > MAX_CLIENTS:
            self._counts.popitem(last=False)

    def _at(self, client: str, now: float) -> tuple[int, int, int]:
        index = self._rate.index(now)
        window, current, previous = self._counts.get(client, (index, 0, 0))
        if window == index:
            return window, current, previous
        return index, 0, current if window == index - 1 else 0
