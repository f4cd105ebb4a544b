"""How much a client may use in how long, requests or tokens, and how much it has used."""

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
    """limit: requests, or tokens, in any `window` seconds."""

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
        """Seconds until one more fits, 0 for now.

        previous, current: those of the last whole window and of this one so far. Those of the last are taken to
        have come evenly: of them the share counts that lies less than a window ago.
        """
        gone = now / self.window - self.index(now)
        room = self.limit - 1 - current
        if room >= 0:
            needed = 1 - room / previous if previous > room else 0.0
            return max(0.0, needed - gone) * self.window
        needed = 1 - (self.limit - 1) / current  # of the window after this one
        return (1 - gone + needed) * self.window

    def remaining(self, previous: int, current: int, now: float) -> int:
        """How many more would fit now."""
        gone = now / self.window - self.index(now)
        return max(0, int(self.limit - current - previous * (1 - gone)))

    def reset(self, previous: int, current: int, now: float) -> float:
        """Seconds until nothing counts any more."""
        windows = 2 if current else 1 if previous else 0
        return max(0.0, (self.index(now) + windows) * self.window - now)

    def __str__(self) -> str:
        return f"{self.limit}/{next(name for name, seconds in SECONDS.items() if seconds == self.window)}"


@dataclass(frozen=True, slots=True)
class Taken:
    """What a limit said of an amount, and where it stands in the counts.

    seconds: until one more fits; 0 where the amount was counted. remaining, reset: of the rate, this one counted.
    window: in which it was counted; shared: whether Redis has it too.
    """

    rate: Rate
    client: str
    amount: int
    seconds: float
    remaining: int
    reset: float
    window: int
    shared: bool

    @classmethod
    def of(cls, rate: Rate, client: str, amount: int, counts: tuple[int, int], now: float, *, shared: bool) -> "Taken":
        """counts: of the last window and of this one, before it. It fits if one more does: it may go past the limit."""
        previous, current = counts
        seconds = rate.wait(previous, current, now)
        after = (previous, current if seconds else current + amount, now)
        return cls(rate, client, amount, seconds, rate.remaining(*after), rate.reset(*after), rate.index(now), shared)


class LocalCounts:
    """What clients have used of this server alone. Used from one thread; the clients seen last are remembered."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # By client and length of the window: the window's number, what was used in it and in the one before.
        self._counts: OrderedDict[tuple[str, int], tuple[int, int, int]] = OrderedDict()

    def ask(self, client: str, rate: Rate, amount: int, share: int) -> Taken:
        """Whether it fits, if `share` servers have the limit between them. Nothing is counted."""
        now = self._clock()
        _, current, previous = self._at(client, rate, now)
        own = Rate(max(1, rate.limit // share), rate.window)
        return Taken.of(own, client, amount, (previous, current), now, shared=False)

    def add(self, client: str, rate: Rate, amount: int, window: int) -> None:
        """Count for the window of that number, if it still matters."""
        now, current, previous = self._at(client, rate, self._clock())
        if window == now:
            current += amount
        elif window == now - 1:
            previous += amount
        self._counts[client, rate.window] = (now, current, previous)
        self._counts.move_to_end((client, rate.window))
        if len(self._counts) > MAX_CLIENTS:
            self._counts.popitem(last=False)

    def _at(self, client: str, rate: Rate, now: float) -> tuple[int, int, int]:
        index = rate.index(now)
        window, current, previous = self._counts.get((client, rate.window), (index, 0, 0))
        if window == index:
            return window, current, previous
        return index, 0, current if window == index - 1 else 0
