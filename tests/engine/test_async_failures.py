"""What happens when a request, a load or the engine itself fails, and what health says meanwhile."""

import asyncio
from typing import NoReturn

import pytest

from adapters_store.errors import CodedError
from server.engine.request import FinishReason, SamplingParams
from server.errors import NotReady
from tests.engine.fakes import expected_tokens
from tests.engine.front import PATIENCE, PROMPT, collect, front, running, tokens


class TestFailures:
    async def test_a_failed_request_ends_with_its_error_and_others_go_on(self) -> None:
        async with running() as own:
            own.runner.faulty = {"bad"}
            bad, good = await asyncio.gather(own.generate("bad"), own.generate("good", [3, 4]))
            assert [output.finish_reason for output in bad] == [FinishReason.ERROR]
            assert bad[0].error is not None
            assert bad[0].error.code == "engine_failure"
            assert tokens(good) == expected_tokens([3, 4], 4)
            assert own.engine.healthy()
            own.assert_idle()

    async def test_a_failed_load_ends_its_stream(self) -> None:
        async with running() as own:
            own.loader.automatic = False
            stream = await own.submit("a", adapters=["x"])
            assert await asyncio.to_thread(own.loader.asked.wait, PATIENCE)
            own.loader.end("x", CodedError("gone", code="model_not_found"))
            own.engine.notify()
            [output] = await collect(stream)
            assert output.error is not None
            assert output.error.code == "model_not_found"
            own.assert_idle()

    async def test_when_the_engine_dies_every_stream_ends_with_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with running(max_running=1) as own:
            own.runner.close_gate()
            streams = [await own.submit(str(index)) for index in range(3)]
            await own.runner.at_gate()

            def die(*_: object) -> NoReturn:
                raise MemoryError("scripted death")

            monkeypatch.setattr(own.fake.core, "publish", die)
            own.runner.open_gate()
            for stream in streams:
                outputs = await collect(stream)
                assert outputs[-1].finish_reason is FinishReason.ERROR
                assert outputs[-1].error is not None
                assert outputs[-1].error.code == "engine_stopped"
                assert "scripted" not in outputs[-1].error.message
            await asyncio.to_thread(own.engine._thread.join, PATIENCE)
            assert not own.engine.healthy()
            assert not own.engine.ready()
            with pytest.raises(NotReady):
                await own.submit("late")
            assert own.engine._admitted == 0

    async def test_a_leak_found_at_idle_stops_the_engine(self) -> None:
        """Better dead and restarted than wrong."""
        async with running() as own:
            await own.generate("a")
            own.fake.scheduler.blocks._references[0] += 1
            stream = await own.submit("b")
            await collect(stream)
            await asyncio.to_thread(own.engine._thread.join, PATIENCE)
            assert not own.engine.healthy()

    async def test_stop_ends_streams(self) -> None:
        async with running(max_running=1) as own:
            own.runner.close_gate()
            streams = [await own.submit(str(index), PROMPT, SamplingParams(max_tokens=50)) for index in range(3)]
            await own.runner.at_gate()
            stopping = asyncio.create_task(own.engine.stop())
            await own.runner.at_gate()  # by now the stop has begun
            assert not own.engine.ready()
            with pytest.raises(NotReady):
                await own.submit("late")
            own.runner.open_gate()
            await stopping
            for stream in streams:
                outputs = await collect(stream)
                assert outputs[-1].finish_reason is FinishReason.ERROR
                assert outputs[-1].error is not None
                assert outputs[-1].error.code == "engine_stopped"
            assert not own.engine.healthy()
            await own.engine.stop()

    async def test_stop_while_idle(self) -> None:
        async with running() as own:
            await own.engine.stop()
            assert not own.engine.healthy()


class TestHealth:
    async def test_not_before_the_start(self) -> None:
        own = front()
        assert not own.engine.healthy()
        assert not own.engine.ready()

    async def test_idle_and_busy_are_healthy(self) -> None:
        async with running() as own:
            assert own.engine.healthy()
            assert own.engine.ready()
            assert own.engine.stats().seconds_since_step == 0
            own.runner.close_gate()
            stream = await own.submit("a")
            await own.runner.at_gate()
            assert own.engine.ready()
            own.runner.open_gate()
            await collect(stream)
