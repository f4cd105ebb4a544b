"""Requests of the server's own: run to their end, and waiting where others' requests fill the queue."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol, TypeVar

from server.engine.request import FinishReason, GenerationRequest, PromptOutput, StepOutput
from server.errors import Overloaded

TIMES = 120  # that an engine which takes no more requests is asked again, a second apart
S = TypeVar("S", covariant=True)


class Stream(Protocol):
    def __aiter__(self) -> AsyncIterator[StepOutput]: ...
    async def aclose(self) -> None: ...


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


async def finished(stream: Stream) -> PromptOutput | None:
    """The facts of the prompt, if any came, once the request has ended; its own error is raised. Closes the stream."""
    prompt = None
    try:
        async for output in stream:
            if output.finish_reason is FinishReason.ERROR and output.error is not None:
                raise output.error
            prompt = output.prompt or prompt
    finally:
        await stream.aclose()
    return prompt
