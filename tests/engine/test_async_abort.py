"""Requests given up in any state, by their client or by id."""

import asyncio

import pytest

from server.engine.request import FinishReason, SamplingParams
from server.errors import InvalidRequest
from tests.engine.fakes import expected_tokens
from tests.engine.front import HELD_TEXT, PATIENCE, PROMPT, HeldEncode, collect, running, tokens


class TestAbort:
    async def test_queued(self) -> None:
        async with running(max_running=1) as own:
            own.runner.close_gate()
            first, second = await own.submit("a"), await own.submit("b")
            await own.runner.at_gate()
            await second.aclose()
            own.runner.open_gate()
            assert tokens(await collect(first)) == expected_tokens(PROMPT, 4)
            await own.settle()
            assert not any("b" in ids for ids in own.runner.runs), "it never began to compute"
            own.assert_idle()

    async def test_in_the_middle_of_a_stream(self) -> None:
        async with running() as own:
            async with await own.submit("a", PROMPT, SamplingParams(max_tokens=50)) as stream:
                async for output in stream:
                    assert output.finish_reason is None
                    break
            await own.settle()
            own.assert_idle()
            assert own.fake.scheduler.blocks.num_free == 16

    async def test_in_the_middle_of_a_step(self) -> None:
        async with running() as own:
            own.runner.close_gate()
            stream, other = await own.submit("a"), await own.submit("b", [9, 9])
            await own.runner.at_gate()
            await stream.aclose()
            own.runner.open_gate()
            assert tokens(await collect(other)) == expected_tokens([9, 9], 4)
            assert await collect(stream) == [], "a closed stream gives nothing more"
            await own.settle()
            own.assert_idle()

    async def test_while_its_adapter_is_loading(self) -> None:
        async with running() as own:
            own.loader.automatic = False
            stream = await own.submit("a", adapters=["x"])
            assert await asyncio.to_thread(own.loader.asked.wait, PATIENCE)
            await stream.aclose()
            await own.settle()
            own.loader.end("x")
            own.engine.notify()
            await own.settle()
            own.assert_idle()

    async def test_a_client_that_goes_away_while_waiting(self) -> None:
        async with running() as own:
            own.runner.close_gate()

            async def client() -> None:
                async with await own.submit("a") as stream:
                    await collect(stream)

            task = asyncio.create_task(client())
            await own.runner.at_gate()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert own.engine._admitted == 0
            own.runner.open_gate()
            await own.settle()
            own.assert_idle()

    async def test_a_client_that_goes_away_while_its_prompt_is_tokenised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with running() as own:
            hold = HeldEncode(own, monkeypatch)
            task = asyncio.create_task(own.submit("a", HELD_TEXT))
            await hold.begun()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            hold.go.set()
            await own.settle()
            own.assert_idle()
            assert not any("a" in ids for ids in own.runner.runs)

    async def test_by_id_while_its_prompt_is_tokenised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The request must neither run without a reader nor leave its caller waiting for ever."""
        async with running() as own:
            hold = HeldEncode(own, monkeypatch)
            task = asyncio.create_task(own.submit("a", HELD_TEXT))
            await hold.begun()
            own.engine.abort("a")
            hold.go.set()
            assert [output.finish_reason for output in await collect(await task)] == [FinishReason.ABORT]
            await own.settle()
            assert not any("a" in ids for ids in own.runner.runs)
            own.assert_idle()

    async def test_an_id_used_again_at_once_has_its_own_answer(self) -> None:
        """Outputs of the aborted request are on their way while the next one with its id begins."""
        async with running() as own:
            own.runner.close_gate()
            old = await own.submit("a", [7, 7, 7])
            await own.runner.at_gate()
            await old.aclose()
            try:
                new = await own.submit("a", PROMPT)
            except InvalidRequest:  # refusing is right, too
                new = None
            own.runner.open_gate()
            assert new is None or tokens(await collect(new)) == expected_tokens(PROMPT, 4)
            await own.settle()
            own.assert_idle()

    async def test_an_unknown_id_is_ignored(self) -> None:
        async with running() as own:
            own.engine.abort("never heard of")
            await own.settle()
            own.assert_idle()
