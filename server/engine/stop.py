"""Finds stop strings in text that arrives in pieces."""


class StopWatch:
    """Releases text only when it can no longer be part of a stop string.

    A stop string may begin in one token and end in another; text that could be its beginning is held back. The first
    one to be complete wins (the longest, if several are), so the result does not depend on how the text is cut.
    """

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take new text and return what is certain. After a match `matched` is set and the rest is dropped."""
        if not self._stops:
            return text
        self._held += text
        found = [(position, stop) for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            position, self.matched = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            end = position + len(self.matched) if self._include else position
            released, self._held = self._held[:end], ""
            return released
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def flush(self) -> str:
        """The text still held, when no more will come."""
        released, self._held = self._held, ""
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
