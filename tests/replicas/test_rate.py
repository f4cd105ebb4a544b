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


class Counts(LocalCounts):
    """With one rate."""

    def __init__(self, rate: Rate, clock: Clock) -> None:
        super().__init__(clock)
        self.rate, self.now = rate, clock

    def wait(self, client: str, share: int) -> float:
        return self.ask(client, self.rate, 1, share).seconds

    def count(self, client: str, amount: int = 1) -> None:
        self.add(client, self.rate, amount, self.rate.index(self.now()))


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
    counts = Counts(Rate(4, 60), clock)
    for _ in range(4):
        assert counts.wait("c", 1) == 0
        counts.count("c")
    assert 0 < counts.wait("c", 1) <= 60 + 60 / 4
    assert counts.wait("other", 1) == 0
    clock.now += 60
    assert counts.wait("c", 1) > 0, "all four lie less than a window ago"
    clock.now += 16
    assert counts.wait("c", 1) == 0, "a quarter of them no longer"
    clock.now += 120
    assert counts.wait("c", 1) == 0


def test_servers_share_what_is_allowed() -> None:
    counts = Counts(Rate(8, 60), Clock())
    counts.count("c")
    counts.count("c")
    assert counts.wait("c", 1) == 0
    assert counts.wait("c", 3) > 0
    assert Counts(Rate(1, 60), Clock()).wait("c", 4) == 0, "one each at least"


def test_clients_seen_long_ago_are_forgotten_first() -> None:
    counts = Counts(Rate(1, 60), Clock())
    for number in range(MAX_CLIENTS + 1):
        counts.count(str(number))
    assert counts.wait("0", 1) == 0
    assert counts.wait("1", 1) > 0


def test_a_rate_is_written_as_it_is_read() -> None:
    for text in ("60/minute", "1/second", "100000/hour", "7/day"):
        assert str(Rate.parse(text)) == text


def test_what_remains_and_when_all_is_there_again() -> None:
    rate, now = Rate(10, 60), 6015.0  # a quarter of the minute is gone
    assert (rate.remaining(0, 0, now), rate.reset(0, 0, now)) == (10, 0)
    assert (rate.remaining(0, 3, now), rate.reset(0, 3, now)) == (7, 105)
    assert (rate.remaining(8, 0, now), rate.reset(8, 0, now)) == (4, 45)
    assert rate.remaining(8, 30, now) == 0


def test_an_amount_is_let_in_while_one_more_fits_and_delays_the_next() -> None:
    clock = Clock()
    counts = Counts(Rate(100, 60), clock)
    assert counts.ask("c", counts.rate, 250, 1).seconds == 0
    counts.count("c", 250)
    seconds = counts.wait("c", 1)
    assert seconds == pytest.approx(60 + 60 * (1 - 99 / 250))
    clock.now += seconds - 0.1
    assert counts.wait("c", 1) > 0
    clock.now += 0.2
    assert counts.wait("c", 1) == 0


def test_what_is_given_back_counts_where_it_was_taken() -> None:
    clock = Clock()
    counts = Counts(Rate(100, 60), clock)
    taken = counts.rate.index(clock.now)
    counts.count("c", 100)
    clock.now += 60
    assert counts.wait("c", 1) > 0
    counts.add("c", counts.rate, -100, taken)
    assert counts.ask("c", counts.rate, 1, 1).remaining == 99
    clock.now += 120
    counts.add("c", counts.rate, -100, taken)
    assert counts.ask("c", counts.rate, 1, 1).remaining == 99, "that window is over"


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
    counts = Counts(Rate(limit, window), clock)
    admitted: list[float] = []
    for pause in pauses:
        clock.now += pause
        seconds = counts.wait("c", 1)
        assert 0 <= seconds <= 2 * window
        if seconds:
            clock.now += seconds + 1e-3 * window
            assert counts.wait("c", 1) == 0
        counts.count("c")
        admitted.append(clock.now)
        index = Rate(limit, window).index(clock.now)
        assert sum(Rate(limit, window).index(moment) == index for moment in admitted) <= limit
