"""What the engine counts of its steps: told by the engine over the fakes, and checked against what it did."""

import pytest

from server.engine.adapter_loader import LoadSeconds
from server.engine.batch import ScheduledBatch, ScheduledSequence
from server.engine.step_watch import MAX_USES, NEWEST_SHARE, StepWatch
from tests.engine.fakes import Engine
from tests.engine.support import make_sequence, prompt


class Clock:
    """In place of `time` in the watch."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("server.engine.step_watch.time", clock)
    return clock


def decode(watch: StepWatch, clock: Clock, rows: int, seconds: float, *adapters: str) -> None:
    """A step of so many decodes, the first of which have these adapters."""
    entries = []
    for row in range(rows):
        sequence = make_sequence(f"{row}", prompt(3), adapters=adapters[row : row + 1])
        watch.added(sequence)
        sequence.tokens.append(1)
        entries.append(ScheduledSequence(sequence, 3, 1))
    batch = ScheduledBatch(tuple(entries))
    watch.begins(batch)
    clock.now += seconds
    watch.ends(batch)


def test_a_request_from_its_arrival_to_its_end(clock: Clock) -> None:
    watch = StepWatch(LoadSeconds())
    sequence = make_sequence("a", prompt(5), adapters=["x"])
    watch.added(sequence)
    clock.now += 2
    for start, count, seconds in ((0, 3, 0.5), (3, 2, 0.25), (5, 1, 0.125)):
        batch = ScheduledBatch((ScheduledSequence(sequence, start, count),))
        watch.begins(batch)
        clock.now += seconds
        if start:
            sequence.tokens.append(9)
        watch.ends(batch)
    watch.ended(sequence)
    figures = watch.figures()
    assert (figures.queue_seconds.sum, figures.queue_seconds.count) == (2, 1)
    assert (figures.prefill_seconds.sum, figures.prefill_seconds.count) == (0.75, 1)
    assert (figures.decode_seconds.sum, figures.decode_seconds.count) == (0.125, 1)
    assert (figures.prompt_tokens.sum, figures.answer_tokens.sum) == (5, 2)
    times = {(kind, with_): found.sum for kind, with_, found in figures.step_seconds}
    assert times == {("prefill", True): 0.75, ("decode", True): 0.125, ("prefill", False): 0, ("decode", False): 0}
    use = watch.take_uses()["x"]
    assert (use.tokens, use.waits, use.wait_seconds) == (6, 1, 2)


def test_a_request_of_one_token_ends_in_its_first_step(clock: Clock) -> None:
    watch = StepWatch(LoadSeconds())
    sequence = make_sequence("a", prompt(2))
    watch.added(sequence)
    batch = ScheduledBatch((ScheduledSequence(sequence, 0, 2),))
    watch.begins(batch)
    clock.now += 0.5
    sequence.tokens.append(9)
    watch.ended(sequence)
    watch.ends(batch)
    figures = watch.figures()
    assert (figures.prefill_seconds.count, figures.prefill_seconds.sum) == (1, 0.5)
    assert (figures.decode_seconds.count, figures.decode_seconds.sum) == (1, 0)


def test_adapters_cost_what_steps_of_as_many_rows_do_not(clock: Clock) -> None:
    watch = StepWatch(LoadSeconds())
    decode(watch, clock, 2, 9.0, "x")
    assert watch.figures().compared_seconds == 0, "there was nothing to compare with"
    decode(watch, clock, 2, 1.0)
    decode(watch, clock, 2, 2.0)
    decode(watch, clock, 3, 9.0, "x")
    decode(watch, clock, 2, 1.5, "x", "y")
    figures = watch.figures()
    assert figures.compared_seconds == pytest.approx(1.5)
    assert figures.compared_base_seconds == pytest.approx(1.0 + NEWEST_SHARE)
    assert (figures.adapters_per_step.sum, figures.adapters_per_step.count) == (4, 5)


def test_uses_are_told_once_and_bounded(clock: Clock) -> None:
    watch = StepWatch(LoadSeconds())
    for number in range(MAX_USES + 2):
        decode(watch, clock, 1, 0.0, f"{number}")
    decode(watch, clock, 1, 0.0, "trial-1")
    decode(watch, clock, 1, 0.0, "0")
    uses = watch.take_uses()
    assert len(uses) == MAX_USES + 1
    assert (uses[""].tokens, uses["0"].tokens) == (3, 2)
    assert watch.take_uses() == {}


def test_the_engine_tells_all_of_it() -> None:
    engine = Engine()
    engine.add("base", prompt(5), max_tokens=3)
    engine.add("a", prompt(6, 1), adapters=["x"], max_tokens=4)
    engine.add("failed", prompt(6, 2), adapters=["bad"], max_tokens=4)
    assert 0 < engine.core.oldest_waiting_seconds() < 600
    engine.run(fail={"bad"})
    assert engine.core.oldest_waiting_seconds() == 0
    figures, uses = engine.core.watch.figures(), engine.core.watch.take_uses()
    assert figures.queue_seconds.count == figures.prefill_seconds.count == figures.decode_seconds.count == 2
    assert (figures.prompt_tokens.sum, figures.answer_tokens.sum) == (11, 7)
    assert sum(found.count for _, _, found in figures.step_seconds) == engine.core.stats.steps_total
    assert {digest: use.waits for digest, use in uses.items()} == {"x": 1}
    assert uses["x"].tokens == 6 + 3, "the prompt, and every token but the last"
    assert dict(figures.load_seconds)["place"].count == 1


def test_a_preempted_request_waited_once() -> None:
    engine = Engine(blocks=5, budget=32)
    engine.add("a", prompt(6), max_tokens=6)
    engine.add("b", prompt(6, 1), max_tokens=6)
    engine.run()
    assert engine.core.stats.preemptions_total > 0
    assert engine.core.watch.figures().queue_seconds.count == 2
