"""A traced request is told when it came, began, answered and ended, and which loads it waited for."""

import asyncio
import time

from server.engine.request import GenerationRequest, SamplingParams, Timeline
from tests.engine.front import PATIENCE, PROMPT, Front, collect, running
from tests.engine.support import weighted


async def timeline(own: Front, request_id: str, *adapters: str) -> Timeline:
    sampling = SamplingParams(max_tokens=3)
    request = GenerationRequest(request_id, tuple(PROMPT), sampling, weighted(adapters), traced=True)
    outputs = await collect(await own.engine.submit(request))
    assert [output.timeline for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].timeline is not None
    return outputs[-1].timeline


async def test_times_are_in_order() -> None:
    async with running() as own:
        before = time.monotonic()
        told = await timeline(own, "a")
        assert before <= told.added <= told.begun <= told.answered <= told.ended <= time.monotonic()
        assert (told.prompt_tokens, told.output_tokens, told.loads) == (len(PROMPT), 3, ())


async def test_only_loads_that_were_waited_for_are_told() -> None:
    async with running() as own:
        own.loader.automatic = False
        telling = asyncio.create_task(timeline(own, "first", "x"))
        assert await asyncio.to_thread(own.loader.asked.wait, PATIENCE)
        own.loader.end("x")
        own.engine.notify()
        told = await telling
        [(digest, begun, ended)] = told.loads
        assert digest == "x"
        assert told.added <= begun <= ended <= told.begun
        assert (await timeline(own, "second", "x")).loads == (), "it was there already"


async def test_others_have_none() -> None:
    async with running() as own:
        assert [output.timeline for output in await own.generate("a")] == [None] * 4
