"""One call's requests to the engine: opened together, read interleaved, always closed."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from server.api.call import Call
from server.api.current import CURRENT
from server.api.disconnect import cancel_all, to_the_end, unless_disconnected
from server.api.errors import RequestAborted
from server.api.services import GenerationStream
from server.api.usage_limits import TokenTally
from server.engine.request import Candidate, FinishReason, GenerationRequest, PromptOutput, StepOutput
from server.errors import EngineFailure
from server.metrics import GenerationTimer

READ_AHEAD = 2

Indexed = tuple[int, StepOutput]


class Generations:
    """The answers to the requests of one call, by their index. The first failure ends all of them."""

    def __init__(self, streams: Sequence[GenerationStream], timer: GenerationTimer, tally: TokenTally) -> None:
        self._streams = streams
        self._timer = timer
        self._tally = tally
        self._queue: asyncio.Queue[Indexed | Exception] = asyncio.Queue()
        # Room in the queue is each stream's own: a fast one cannot keep the others out.
        self._room = [asyncio.Semaphore(READ_AHEAD) for _ in streams]
        self._readers: list[asyncio.Task[None]] = []
        self._unfinished = len(streams)
        self._peeked: list[Indexed] = []

    @classmethod
    async def open(cls, call: Call, requests: Sequence[GenerationRequest], endpoint: str) -> "Generations":
        """Room is asked for all before any is submitted; if one is refused, those before it are aborted."""
        call.engine.check_capacity(len(requests), call.caller.tenant, requests[0].adapters)
        tally = await TokenTally.open(call.request, call.caller, call.services.replicas, requests)
        timer = call.services.metrics.generation(endpoint, len(requests))
        current = CURRENT.get()
        if current is not None and current.timelines is not None:
            requests = [replace(request, traced=True) for request in requests]
        streams: list[GenerationStream] = []
        try:
            for request in requests:
                streams.append(await call.engine.submit(request))  # noqa: PERF401 - those opened must be closed below
        except BaseException:
            tally.settle()
            await to_the_end(close_all(streams))
            raise
        return cls(streams, timer, tally)

    async def peek(self) -> None:
        """Wait for the first output, so that an early failure still gets its own HTTP status."""
        self._peeked.append(await self._next())

    async def outputs(self) -> AsyncIterator[Indexed]:
        """Outputs of all requests as they come, until each has finished."""
        while self._peeked or self._unfinished:
            index, output = self._peeked.pop() if self._peeked else await self._next()
            yield index, output

    async def _next(self) -> Indexed:
        if not self._readers:
            self._readers = [asyncio.create_task(self._read(i, stream)) for i, stream in enumerate(self._streams)]
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        self._room[item[0]].release()
        self._unfinished -= item[1].finish_reason is not None
        return item

    async def _read(self, index: int, stream: GenerationStream) -> None:
        """Carry one stream into the queue, no further ahead of the client than there is room."""
        try:
            async for output in stream:
                _note(output)
                self._tally.output(index, output)
                _raise_failure(output)
                self._timer.output(index, output)
                await self._room[index].acquire()
                self._queue.put_nowait((index, output))
                if output.finish_reason is not None:
                    return
            raise EngineFailure("The engine ended this request without a finish reason.")  # noqa: TRY301
        except Exception as error:
            self._queue.put_nowait(error)

    async def aclose(self) -> None:
        """Abort what is unfinished. Idempotent."""
        await to_the_end(self._close())

    async def _close(self) -> None:
        await cancel_all(*self._readers)
        await close_all(self._streams)
        self._timer.done()
        self._tally.settle()


async def close_all(streams: Sequence[GenerationStream]) -> None:
    """Close each, even if the closing of another fails."""
    await asyncio.gather(*(stream.aclose() for stream in streams), return_exceptions=True)


def _note(output: StepOutput) -> None:
    """The readers run in the context of the request that opened them."""
    current = CURRENT.get()
    if output.timeline is not None and current is not None and current.timelines is not None:
        current.timelines.append(output.timeline)


def _raise_failure(output: StepOutput) -> None:
    if output.finish_reason is FinishReason.ERROR:
        raise output.error or EngineFailure("The engine could not finish this request.")
    if output.finish_reason is FinishReason.ABORT:
        raise RequestAborted("The server ended this request before it was finished. Send it again.")


@dataclass(slots=True)
class Token:
    """One generated token with what was asked for."""

    id: int
    logprob: float | None
    top: tuple[Candidate, ...]


@dataclass(slots=True)
class Answer:
    """A finished (or growing) answer."""

    pieces: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    prompt: PromptOutput | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, output: StepOutput) -> None:
        self.pieces.append(output.text)
        self.prompt = output.prompt or self.prompt
        if output.token_id is not None:
            self.tokens.append(Token(output.token_id, output.logprob, output.top))
        if output.finish_reason is not None:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def mean_logprob(self) -> float:
        return sum(token.logprob or 0.0 for token in self.tokens) / max(1, len(self.tokens))


async def open_generations(call: Call, requests: Sequence[GenerationRequest], endpoint: str) -> Generations:
    """Open and wait for the first output; nothing stays behind if that fails or the client leaves."""
    return await unless_disconnected(call.request, _opened(call, requests, endpoint))


async def _opened(call: Call, requests: Sequence[GenerationRequest], endpoint: str) -> Generations:
    generations = await Generations.open(call, requests, endpoint)
    try:
        await generations.peek()
    except BaseException:
        await generations.aclose()
        raise
    return generations


async def generate(call: Call, requests: Sequence[GenerationRequest], endpoint: str) -> list[Answer]:
    """All answers in the order of the requests. Ends early when the client leaves."""
    return await unless_disconnected(call.request, _collect(call, requests, endpoint))


async def _collect(call: Call, requests: Sequence[GenerationRequest], endpoint: str) -> list[Answer]:
    answers = [Answer() for _ in requests]
    generations = await Generations.open(call, requests, endpoint)
    try:
        async for index, output in generations.outputs():
            answers[index].add(output)
    finally:
        await generations.aclose()
    return answers


def now() -> int:
    return int(time.time())
