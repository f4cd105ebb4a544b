"""Requests of work in the background, which waits where others' requests fill the queue."""

import asyncio
from typing import Protocol, TypeVar

from server.engine.request import GenerationRequest
from server.errors import Overloaded

TIMES = 120  # that an engine which takes no more requests is asked again, a second apart
S = TypeVar("S", covariant=True)


class Engine(Protocol[S]):
    """What is needed of the engine."""

    async def submit(self, request: GenerationRequest) -> S: ...


async def submitted(engine: Engine[S], request: GenerationRequest) -> S:
    """The stream of a request; raises what `submit` raises, Overloaded once it has waited for long."""
    for _ in range(TIMES):
        try:
            return await engine.submit(request)
        except Overloaded:
            await asyncio.sleep(1)
    return await engine.submit(request)
