"""Aborts in every state, and when the engine thread may sleep: never with work that could go on, and never to spin."""

import pytest

from adapters_store.errors import CodedError
from server.engine.core import LOADS_IN_FLIGHT
from server.engine.request import FinishReason
from tests.engine.fakes import Engine, expected_tokens
from tests.engine.support import prompt


class TestAbort:
    def ended(self, engine: Engine) -> None:
        assert engine.reason("a") is FinishReason.ABORT
        engine.run()
        assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
        assert not engine.working()
        engine.add("b", prompt(4), adapters=["x"], max_tokens=2)
        engine.run()
        assert engine.tokens("b") == expected_tokens(prompt(4), 2, ["x"])

    def test_queued(self) -> None:
        engine = Engine()
        engine.add("a", prompt(4))
        engine.abort("a")
        self.ended(engine)

    def test_waiting_for_a_load(self) -> None:
        engine = Engine()
        engine.add("a", prompt(4), adapters=["x"])
        engine.step()
        engine.abort("a")
        assert engine.loader.started == ["x"]
        self.ended(engine)
        assert engine.loader.history == ["x"], "the load went on and served the next request"

    def test_with_its_adapter_staged(self) -> None:
        engine = Engine(pages=1)
        engine.scheduler.adapters.pin("p")
        engine.run()
        engine.add("base", prompt(3), max_tokens=5)
        engine.add("a", prompt(4), adapters=["x"])
        engine.step()
        engine.loader.end("x")
        engine.step()
        engine.abort("a")
        engine.scheduler.adapters.unpin("p")
        self.ended(engine)

    @pytest.mark.parametrize("steps", range(1, 5))
    def test_running(self, steps: int) -> None:
        engine = Engine(budget=6)
        engine.add("a", prompt(14), max_tokens=9)
        for _ in range(steps):
            engine.step()
        engine.abort("a")
        self.ended(engine)

    def test_preempted(self) -> None:
        engine = Engine(blocks=4, budget=32)
        engine.add("old", prompt(4, 1), max_tokens=9)
        engine.add("a", prompt(4, 2), max_tokens=9)
        while not engine.scheduler.num_preemptions:
            engine.step()
        engine.abort("a")
        self.ended(engine)
        assert engine.tokens("old") == expected_tokens(prompt(4, 1), 9)

    def test_ended_or_unknown_is_ignored(self) -> None:
        engine = Engine()
        engine.add("a", prompt(4), max_tokens=1)
        engine.run()
        engine.abort("a")
        engine.abort("never heard of")
        assert engine.reason("a") is FinishReason.LENGTH
        assert "never heard of" not in engine.outputs


class TestBlocked:
    """`blocked` decides whether the engine thread sleeps. Engine.step asserts both directions on every step."""

    def test_idle_has_no_work(self) -> None:
        engine = Engine()
        assert not engine.working()
        engine.add("a", prompt(4), max_tokens=2)
        assert engine.working()
        assert engine.run() == 2
        assert not engine.working()

    def test_waiting_for_a_load_is_one_step_then_sleep(self) -> None:
        engine = Engine()
        engine.add("a", prompt(4), adapters=["x"], max_tokens=1)
        engine.step()
        assert engine.resting()
        assert engine.working()
        assert not engine.has_arrivals()
        engine.loader.end("x")
        assert engine.has_arrivals()
        engine.step()
        assert not engine.resting()
        assert engine.reason("a") is FinishReason.LENGTH

    def test_running_beside_a_load_does_not_sleep(self) -> None:
        engine = Engine()
        engine.add("a", prompt(4), adapters=["x"])
        engine.add("b", prompt(4), max_tokens=3)
        for _ in range(3):
            engine.step()
            assert not engine.resting()
        engine.step()
        assert engine.resting()

    def test_prefill_without_output_does_not_sleep(self) -> None:
        engine = Engine(budget=2)
        engine.add("a", prompt(9), max_tokens=1)
        for _ in range(5):
            assert not engine.resting()
            engine.step()
        assert engine.reason("a") is FinishReason.LENGTH

    def test_one_of_two_adapters_has_come(self) -> None:
        engine = Engine()
        engine.add("a", prompt(4), adapters=["x", "y"], max_tokens=1)
        engine.step()
        engine.loader.end("x")
        engine.step()
        assert not engine.resting(), "a placed adapter may let others run"
        engine.step()
        assert engine.resting()
        engine.loader.end("y")
        engine.step()
        assert engine.reason("a") is FinishReason.LENGTH

    def test_a_failed_load_without_waiters(self) -> None:
        engine = Engine()
        engine.add("a", prompt(4), adapters=["x"])
        engine.step()
        engine.abort("a")
        engine.loader.end("x", CodedError("scripted"))
        engine.step()
        assert not engine.working()

    def test_pins_load_without_any_request(self) -> None:
        engine = Engine()
        for index in range(LOADS_IN_FLIGHT + 2):
            engine.scheduler.adapters.pin(f"x{index}")
        assert engine.working()
        assert engine.run() <= 6
        assert engine.scheduler.adapters.num_resident == LOADS_IN_FLIGHT + 2

    def test_steps_are_few(self) -> None:
        """A request of p prompt tokens and n more takes prefill chunks plus n - 1 steps, not one more."""
        engine = Engine(budget=4)
        engine.add("a", prompt(10), max_tokens=5)
        assert engine.run() == 3 + 4
        assert engine.core.stats.steps_total == 7


def test_seconds_since_step_is_of_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("server.engine.core.time.monotonic", lambda: now[0])
    engine = Engine()
    now[0] += 1_000
    assert engine.core.seconds_since_step() == 0
    engine.add("a", prompt(4), max_tokens=2)
    assert engine.core.seconds_since_step() == 0, "idle time before the request does not count"
    now[0] += 40
    assert engine.core.seconds_since_step() == 40
    engine.step()
    assert engine.core.seconds_since_step() == 0
    engine.run()
    now[0] += 1_000
    assert engine.core.seconds_since_step() == 0


def test_waiting_for_a_slow_load_is_not_a_stuck_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("server.engine.core.time.monotonic", lambda: now[0])
    engine = Engine()
    engine.add("a", prompt(4), adapters=["x"], max_tokens=2)
    engine.step()
    now[0] += 1_000
    assert engine.core.seconds_since_step() == 0
