"""Histograms: each value under its bound, and what a reader has stays as it was."""

import pytest

from adapters_store.histogram import NOTHING, Histogram


@pytest.mark.parametrize(("value", "place"), [(-1, 0), (0.5, 0), (1, 0), (1.001, 1), (2, 1), (2.1, 2), (1e9, 2)])
def test_a_value_counts_under_the_first_bound_that_holds_it(value: float, place: int) -> None:
    histogram = Histogram((1, 2))
    histogram.observe(value)
    now = histogram.now()
    assert [index for index, count in enumerate(now.counts) if count] == [place]
    assert (now.count, now.sum, now.bounds) == (1, value, (1, 2))


def test_what_was_read_stays() -> None:
    histogram = Histogram((1,))
    before = histogram.now()
    histogram.observe(3)
    histogram.observe(0.5)
    assert before == Histogram((1,)).now()
    assert histogram.now().counts == (1, 1)
    assert histogram.now().sum == 3.5
    assert NOTHING.count == 0
