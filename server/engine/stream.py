"""What comes out of the engine for one request."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from server.engine.request import GenerationRequest, StepOutput
from server.engine.sequence import Sequence


class GenerationStream:
    """The outputs of one request, in order; closing it early aborts the request."""

    def __init__(self, request: GenerationRequest, abort: Callable[[str], None]) -> None:
        self.request_id = request.request_id
        self.tenant = request.tenant
        self.adapters = frozenset(adapter.digest for adapter in request.adapters)
        self.sequence: Sequence | None = None  # once it is tokenised
        self._abort = abort
        self._outputs: asyncio.Queue[StepOutput] = asyncio.Queue()
        self._ended = False

    @property
    def waits(self) -> bool:
        """Whether it has not begun to run."""
        return self.sequence is None or not self.sequence.begun

    def put(self, output: StepOutput) -> None:
        self._outputs.put_nowait(output)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StepOutput:
        if self._ended:
            raise StopAsyncIteration
        output = await self._outputs.get()
        self._ended = output.finish_reason is not None
        return output

    async def aclose(self) -> None:
        """Abort the request unless it has ended. May be called again."""
        self._ended = True
        self._abort(self.request_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
