"""An engine that is stuck or dead is noticed, by those that wait for it too; one that only takes its time is not."""

import asyncio
import logging
from typing import NoReturn

import pytest

from server.engine.limits import STUCK_SECONDS
from server.engine.liveness import FIRST_STEP, READY_SHARE
from server.engine.request import FinishReason, SamplingParams, StepOutput
from server.errors import EngineStopped, EngineStuck
from tests.api.asgi import until
from tests.engine.front import PATIENCE, PROMPT, collect, running

SOON = 0.2  # seconds until an engine counts as stuck, where a test wants that
SLOW = READY_SHARE * STUCK_SECONDS


def code_of(outputs: list[StepOutput]) -> str:
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert outputs[-1].error is not None
    return outputs[-1].error.code


@pytest.mark.parametrize(
    ("seconds", "ready", "healthy"),
    [
        (0, True, True),
        (SLOW - 1, True, True),
        (SLOW, False, True),
        (STUCK_SECONDS - 1, False, True),
        (STUCK_SECONDS, False, False),
    ],
)
async def test_first_not_ready_then_not_healthy(
    monkeypatch: pytest.MonkeyPatch, seconds: float, ready: bool, healthy: bool
) -> None:
    async with running() as own:
        await own.generate("a")
        monkeypatch.setattr(own.fake.core, "seconds_since_step", lambda: seconds)
        assert (own.engine.ready(), own.engine.healthy()) == (ready, healthy)
        assert (own.engine.stats().seconds_since_step, own.engine.stats().up) == (seconds, healthy)


async def test_the_first_step_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as own:
        monkeypatch.setattr(own.fake.core, "seconds_since_step", lambda: STUCK_SECONDS)
        assert own.engine.healthy()
        monkeypatch.setattr(own.fake.core, "seconds_since_step", lambda: FIRST_STEP * STUCK_SECONDS)
        assert not own.engine.healthy()


async def test_requests_of_a_stuck_engine_end_and_new_ones_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    async with running(stuck_seconds=SOON, max_running=1) as own:
        await own.generate("first")
        own.runner.close_gate()
        streams = [await own.submit(str(index)) for index in range(3)]
        await own.runner.at_gate()
        with caplog.at_level(logging.CRITICAL):
            assert [code_of(await collect(stream)) for stream in streams] == ["engine_stuck"] * 3
            assert not own.engine.healthy()
        with pytest.raises(EngineStuck):
            await own.submit("late")
        with pytest.raises(EngineStuck):
            await own.engine.warm("x")
        [told] = [record for record in caplog.records if record.getMessage() == "engine_stuck"]
        assert "run (front.py:" in told.__dict__["at"]
        own.runner.open_gate()
        await until(own.engine.ready)
        await own.settle()
        own.assert_idle()


async def test_a_command_that_is_not_carried_out_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread hangs before it has taken the request in: the core knows of no work."""
    async with running(stuck_seconds=SOON, max_running=1) as own:
        await own.generate("first")
        own.runner.close_gate()

        def hang(*_: object) -> None:
            own.runner.arrived.set()
            own.runner.gate.acquire()

        monkeypatch.setattr(own.fake.core.experts, "read", hang)
        asking = asyncio.create_task(own.engine.experts("x"))
        await own.runner.at_gate()
        assert own.fake.core.seconds_since_step() == 0
        stream = await own.submit("a")
        with pytest.raises(EngineStuck):
            await asking
        assert code_of(await collect(stream)) == "engine_stuck"
        assert own.engine.stats().seconds_since_step >= SOON
        own.runner.open_gate()


async def test_a_long_load_is_no_reason() -> None:
    async with running(stuck_seconds=SOON) as own:
        await own.generate("first")
        own.loader.automatic = False
        stream = await own.submit("a", adapters=["x"])
        assert await asyncio.to_thread(own.loader.asked.wait, PATIENCE)
        await until(own.fake.resting)
        assert own.engine.stats().seconds_since_step == 0
        assert own.engine.ready()
        own.loader.end("x")
        own.engine.notify()
        assert (await collect(stream))[-1].finish_reason is FinishReason.LENGTH


async def test_a_dead_engine_is_not_called_stuck(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(stuck_seconds=SOON) as own:

        def die(*_: object) -> NoReturn:
            raise MemoryError("scripted death")

        monkeypatch.setattr(own.fake.core, "publish", die)
        stream = await own.submit("a", PROMPT, SamplingParams(max_tokens=2))
        assert code_of(await collect(stream)) == "engine_stopped"
        assert not own.engine.healthy()
        with pytest.raises(EngineStopped):
            await own.submit("late")
        await asyncio.wait_for(asyncio.shield(own.engine._watch), PATIENCE)  # type: ignore[arg-type]
        assert not own.engine.stats().up
        assert [record.getMessage() for record in caplog.records] == ["engine_died"]
