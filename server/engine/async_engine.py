"""The engine for asyncio: requests go to the engine's own thread, outputs come back once per step."""

import asyncio
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Self

from server.engine.activation import check_alone, num_virtual_tokens
from server.engine.answer import Answer
from server.engine.compute_threads import ComputeThreads
from server.engine.core import EngineCore, Outputs
from server.engine.grammar import GrammarCompiler
from server.engine.request import FinishReason, GenerationRequest, SamplingParams, StepOutput
from server.engine.sequence import Sequence
from server.engine.status import AdapterUse, EngineInfo, EngineStats, ExpertLoad, Residency
from server.engine.tokenizer import Tokenizer
from server.errors import ContextTooLong, EngineFailure, InvalidRequest, NotReady, Overloaded

LONG_TEXT = 2_000  # characters; from here on tokenising (about 1 us each) goes to a thread
STUCK_SECONDS = 30.0  # without a step while there is work: not ready
DEAD_SECONDS = 120.0  # the same: not healthy

log = logging.getLogger(__name__)


class GenerationStream:
    """The outputs of one request, in order; closing it early aborts the request."""

    def __init__(self, engine: "AsyncEngine", request_id: str) -> None:
        self.request_id = request_id
        self._engine = engine
        self._outputs: asyncio.Queue[StepOutput] = asyncio.Queue()
        self._ended = False

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
        self._engine.abort(self.request_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncEngine:
    """Front of the engine. All its coroutines run on one event loop; the core runs on one thread of its own.

    A request counts against the queue from `submit` until its last output, so the bound holds before any work.
    """

    def __init__(
        self, core: EngineCore, tokenizer: Tokenizer, grammars: GrammarCompiler, info: EngineInfo, eos: tuple[int, ...]
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self._core = core
        self._grammars = grammars
        self._eos = eos
        self._streams: dict[str, GenerationStream] = {}
        self._leaving: set[str] = set()  # aborted, but their last outputs may still be on their way
        self._applying: set[asyncio.Future[None]] = set()
        self._admitted = 0
        self._inbox: deque[Callable[[], Outputs]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads = ComputeThreads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine thread; call it on the event loop that will submit.

        Load and build in `compute_threads.in_passing`, or every step takes up to twice as long.
        """
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._threads.confine_others()
        self._core.start()

    async def stop(self) -> None:
        """Stop after the current step; requests still running end with an error."""
        self._stopping = True
        self.notify()
        try:
            await asyncio.to_thread(self._thread.join)
            await asyncio.to_thread(self._core.close)
        finally:
            self._threads.release()

    def check_capacity(self, count: int = 1) -> None:
        """Raise Overloaded if `count` more requests do not fit the queue, InvalidRequest if they never will."""
        limit = self.info.max_running + self.info.max_queued
        if count > limit:
            raise InvalidRequest(f"The call makes {count} requests; the server holds {limit} at most. Ask for fewer.")
        if self._admitted + count > limit:
            raise Overloaded(f"{self._admitted} requests are running or queued and the limit is {limit}; retry later.")

    async def submit(self, request: GenerationRequest) -> GenerationStream:
        """Tokenise and queue a request.

        Raises InvalidRequest, ContextTooLong, Overloaded or NotReady; then nothing is left of the request.
        """
        if self._stopping or self._failed:
            raise NotReady("The engine is not running.")
        if request.request_id in self._streams or request.request_id in self._leaving:
            raise InvalidRequest("A request with this id is running.", code="duplicate_request_id")
        self.check_capacity()
        stream = GenerationStream(self, request.request_id)
        self._streams[request.request_id] = stream
        self._admitted += 1
        self._core.prefetch(request.adapters)
        try:
            answer = await self._prepare(request)
        except BaseException:
            self._forget(request.request_id)
            raise
        if self._streams.get(request.request_id) is stream:
            self._post(lambda: self._core.add(answer))
        else:  # aborted by id meanwhile, or the engine has stopped and told the stream already
            self._leaving.discard(request.request_id)
            stream.put(StepOutput(finish_reason=FinishReason.ABORT))
        return stream

    def abort(self, request_id: str) -> None:
        """Drop a request; what it holds is free by the next step."""
        if self._forget(request_id):
            self._leaving.add(request_id)
            self._post(lambda: self._core.abort(request_id))

    def stats(self) -> EngineStats:
        compiler = self._core.compiler
        return replace(
            self._core.stats,
            seconds_since_step=self._core.seconds_since_step(),
            compiling=compiler is not None and compiler.running,
            layers_compiled=compiler is not None and compiler.ready,
            oldest_waiting_seconds=self._core.oldest_waiting_seconds(),
            figures=self._core.watch.figures(),
        )

    def take_uses(self) -> dict[str, AdapterUse]:
        """What each adapter, by digest, was used for since the last call."""
        return self._core.watch.take_uses()

    def residency(self, digest: str) -> Residency:
        return self._core.residency(digest)

    def held(self) -> list[str]:
        """Digests of the adapters in device and host memory, sorted."""
        return self._core.held()

    def pinned(self, digest: str) -> bool:
        return self._core.scheduler.adapters.pinned(digest)

    async def warm(self, digest: str) -> None:
        """Ask for an adapter to be made resident; returns when the load has been asked for, not when it is done."""
        await self._apply(self._core.scheduler.adapters.want, digest)

    async def pin(self, digest: str) -> None:
        """Keep an adapter resident from now on; its load is asked for if need be."""
        await self._apply(self._core.scheduler.adapters.pin, digest)

    async def unpin(self, digest: str) -> None:
        await self._apply(self._core.scheduler.adapters.unpin, digest)

    async def experts(self, digest: str) -> dict[str, ExpertLoad]:
        """How often the adapter's ranks were chosen since it became resident, by module; empty if it is not, or has no
        gates."""
        found: list[dict[str, ExpertLoad]] = []
        await self._apply(lambda digest: found.append(self._core.experts.read(digest)), digest)
        return found[0]

    def discard(self, digest: str) -> None:
        """Have the engine forget an adapter that nobody will ask for again, once earlier aborts have taken effect."""
        self._post(lambda: self._core.discard(digest))

    def healthy(self) -> bool:
        """False if the engine thread is gone or has not stepped for minutes with work to do."""
        return self._thread.is_alive() and not self._failed and self._core.seconds_since_step() < DEAD_SECONDS

    def ready(self) -> bool:
        return self.healthy() and not self._stopping and self._core.seconds_since_step() < STUCK_SECONDS

    def notify(self) -> None:
        """Wake the engine thread (an adapter has arrived, or a request)."""
        with self._wake:
            self._wake.notify()

    async def _prepare(self, request: GenerationRequest) -> Answer:
        params, prompt = request.sampling, request.prompt
        check_alone(request.adapters)
        if isinstance(prompt, str):
            prompt = self._bounded(prompt, params.truncate)
            encode = self.tokenizer.encode
            special = request.add_special_tokens
            long = len(prompt) > LONG_TEXT
            tokens = await asyncio.to_thread(encode, prompt, special) if long else encode(prompt, special)
        else:
            tokens = list(prompt)
        if params.truncate is not None:
            tokens = tokens[max(0, len(tokens) - params.truncate) :]
        max_tokens = self._check(tokens, params, num_virtual_tokens(request.adapters))
        grammar = await asyncio.to_thread(self._grammars.compile, params.grammar) if params.grammar else None
        return Answer(
            Sequence(request, tokens, max_tokens, self.info.fingerprint, self.info.block_size),
            self.tokenizer.stream(tokens),
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            eos_ids=self._eos,
            grammar=grammar,
        )

    def _bounded(self, text: str, truncate: int | None) -> str:
        """Refuse (or cut, where the caller truncates) text that has too many characters for its tokens to fit."""
        if truncate is not None:
            return text[-truncate * self.tokenizer.longest_token :] if truncate else ""
        if len(text) > self.info.max_context * self.tokenizer.longest_token:
            raise ContextTooLong(
                f"The context is {self.info.max_context} tokens; a prompt of {len(text)} characters has more. "
                "Shorten it, or pass truncate.",
                param="prompt",
            )
        return text

    def _check(self, tokens: list[int], params: SamplingParams, virtual: int) -> int:
        """Bounds of the prompt and of every token id; returns how many tokens may be generated.

        virtual: tokens that an adapter puts before the prompt.
        """
        limit, max_tokens = self.info.max_context, params.max_tokens
        named = (*params.logit_bias, *params.stop_token_ids)
        if any(not 0 <= token < self.info.vocabulary for token in named):
            raise InvalidRequest(
                f"Token ids in logit_bias and stop_token_ids must be in 0 to {self.info.vocabulary - 1}.",
                param="logit_bias" if params.logit_bias else "stop_token_ids",
            )
        if not tokens:
            raise InvalidRequest("The prompt is empty: it has no tokens.", param="prompt")
        if min(tokens) < 0 or max(tokens) >= self.info.vocabulary:
            raise InvalidRequest(f"Prompt token ids must be in 0 to {self.info.vocabulary - 1}.", param="prompt")
        room = limit - virtual - len(tokens)
        wanted = 1 if max_tokens is None else max_tokens
        if room < wanted:
            asked = f" and {wanted} more were asked for" if wanted else ""
            before = f"the adapter puts {virtual} before the prompt, which has" if virtual else "the prompt has"
            raise ContextTooLong(
                f"The context is {limit} tokens; {before} {len(tokens)}{asked}. Shorten the prompt, "
                "ask for fewer tokens, or pass truncate.",
                param="max_tokens",
            )
        return room if max_tokens is None else max_tokens

    def _post(self, command: Callable[[], Outputs]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _forget(self, request_id: str) -> bool:
        """Free the answer slot; the one place where a request stops counting."""
        if self._streams.pop(request_id, None) is None:
            return False
        self._admitted -= 1
        return True

    async def _apply(self, action: Callable[[str], None], digest: str) -> None:
        """Run an action on the engine thread, between two steps, and wait until it has taken effect."""
        loop = asyncio.get_running_loop()
        applied: asyncio.Future[None] = loop.create_future()
        self._applying.add(applied)
        applied.add_done_callback(self._applying.discard)

        def finish() -> None:
            if not applied.done():  # the caller may have left
                applied.set_result(None)

        def command() -> Outputs:
            action(digest)
            loop.call_soon_threadsafe(finish)
            return []

        if self._stopping or self._failed:
            raise NotReady("The engine is not running.")
        self._post(command)
        await applied

    def _deliver(self, outputs: Outputs) -> None:
        """On the event loop: give each stream its output."""
        for request_id, output in outputs:
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.put(output)
            if output.finish_reason is not None:
                self._forget(request_id)
                self._leaving.discard(request_id)

    def _end_all(self) -> None:
        """On the event loop, once the engine thread has ended: no stream may wait for ever."""
        error = EngineFailure("The engine stopped before this request was finished.", code="engine_stopped")
        end = StepOutput(finish_reason=FinishReason.ERROR, error=error)
        self._deliver([(request_id, end) for request_id in list(self._streams)])
        for applied in list(self._applying):
            if not applied.done():
                applied.set_exception(error)

    def _run(self) -> None:
        """The engine thread: commands, then a step, until told to stop."""
        try:
            self._threads.take()
            while not self._stopping:
                outputs: Outputs = []
                while self._inbox:
                    outputs += self._inbox.popleft()()
                if self._core.has_work:
                    outputs += self._core.step()
                self._send(outputs)
                self._rest()
        except Exception:
            log.exception("engine_died")
            self._failed = True
        finally:
            self._stopping = True
            self._call_on_loop(self._end_all)

    def _rest(self) -> None:
        """Sleep while there is nothing to compute; woken by a request, an adapter that arrived, or the stop."""
        if not self._core.has_work:
            self._core.publish()
            self._core.check_integrity()
        elif not self._core.blocked:
            return
        with self._wake:
            if not self._inbox and not self._stopping and not self._core.has_arrivals:
                self._wake.wait()

    def _send(self, outputs: Outputs) -> None:
        if outputs:
            self._call_on_loop(lambda: self._deliver(outputs))

    def _call_on_loop(self, callback: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)
