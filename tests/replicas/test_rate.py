"""The sliding window: never more than the limit by its own reckoning, and the wait it tells is enough."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.replicas.rate import MAX_CLIENTS, LocalCounts, Rate


class Clock:
    def __init__(self, now: float = 6000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("60/minute", Rate(60, 60)),
        (" 1 / Second ", Rate(1, 1)),
        ("5/hour", Rate(5, 3600)),
        ("1000000/day", Rate(1_000_000, 86400)),
    ],
)
def test_rates(text: str, rate: Rate) -> None:
    assert Rate.parse(text) == rate


@pytest.mark.parametrize("text", ["", "60", "0/minute", "-1/minute", "1.5/minute", "60/minutes", "60/week", "x/day"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="such as 60/minute"):
        Rate.parse(text)


def test_the_limit_within_a_window_and_its_slow_return() -> None:
    clock = Clock()
    counts = LocalCounts(Rate(4, 60), clock)
    for _ in range(4):
        assert counts.wait("c", 1) == 0
        counts.add("c")
    assert 0 < counts.wait("c", 1) <= 60 + 60 / 4
    assert counts.wait("other", 1) == 0
    clock.now += 60
    assert counts.wait("c", 1) > 0, "all four lie less than a window ago"
    clock.now += 16
    assert counts.wait("c", 1) == 0, "a quarter of them no longer"
    clock.now += 120
    assert counts.wait("c", 1) == 0


def test_servers_share_what_is_allowed() -> None:
    counts = LocalCounts(Rate(8, 60), Clock())
    counts.add("c")
    counts.add("c")
    assert counts.wait("c", 1) == 0
    assert counts.wait("c", 3) > 0
    assert LocalCounts(Rate(1, 60), Clock()).wait("c", 4) == 0, "one each at least"


def test_clients_seen_long_ago_are_forgotten_first() -> None:
    counts = LocalCounts(Rate(1, 60), Clock())
    for number in range(MAX_CLIENTS + 1):
        counts.add(str(number))
    assert counts.wait("0", 1) == 0
    assert counts.wait("1", 1) > 0


@given(
    limit=st.integers(1, 50),
    window=st.sampled_from([1, 60, 3600]),
    pauses=st.lists(st.floats(0, 100), max_size=80),
    start=st.floats(1e9, 1e9 + 4000),
)
def test_whoever_waits_as_told_is_let_in_and_no_window_sees_more_than_twice_the_limit(
    limit: int, window: int, pauses: list[float], start: float
) -> None:
    clock = Clock(start)
    counts = LocalCounts(Rate(limit, window), clock)
    admitted: list[float] = []
    for pause in pauses:
        clock.now += pause
        seconds = counts.wait("c", 1)
        assert 0 <= seconds <= 2 * window
        if seconds:
            clock.now += seconds + 1e-3 * window
            assert counts.wait("c", 1) == 0
        counts.add("c")
        admitted.append(clock.now)
        index = Rate(limit, window).index(clock.now)
        assert sum(Rate(limit, window).index(moment) == index for moment in admitted) <= limit
