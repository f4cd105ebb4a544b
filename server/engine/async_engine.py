"""The engine for asyncio: requests go to the engine's own thread, outputs come back once per step."""

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from adapters_store.errors import CodedError
from server.engine.activation import check_alone, num_virtual_tokens
from server.engine.answer import Answer
from server.engine.compute_threads import ComputeThreads
from server.engine.core import EngineCore, Outputs
from server.engine.grammar import GrammarCompiler
from server.engine.limits import STUCK_SECONDS
from server.engine.liveness import Liveness
from server.engine.prompt_check import bounded, room_for
from server.engine.queue_share import giving_way
from server.engine.request import FinishReason, GenerationRequest, StepOutput, WeightedAdapter
from server.engine.sequence import Sequence
from server.engine.status import AdapterUse, EngineInfo, EngineStats, ExpertLoad, Residency
from server.engine.stream import GenerationStream
from server.engine.tokenizer import Tokenizer
from server.errors import EngineStopped, EngineStuck, InvalidRequest, Overloaded

LONG_TEXT = 2_000  # characters; from here on tokenising (about 1 us each) goes to a thread

log = logging.getLogger(__name__)


class AsyncEngine:
    """Front of the engine. All its coroutines run on one event loop; the core runs on one thread of its own.

    A request counts against the queue from `submit` until its last output, so the bound holds before any work.
    """

    def __init__(
        self,
        core: EngineCore,
        tokenizer: Tokenizer,
        grammars: GrammarCompiler,
        info: EngineInfo,
        eos: tuple[int, ...],
        stuck_seconds: float = STUCK_SECONDS,
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
        self._liveness = Liveness(core, stuck_seconds)
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the engine thread; call it on the event loop that will submit.

        Load and build in `compute_threads.in_passing`, or every step takes up to twice as long.
        """
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watch = self._loop.create_task(self._liveness.watch(self._thread, self._give_up), name="engine-watch")
        self._threads.confine_others()
        self._core.start()

    async def stop(self) -> None:
        """Stop after the current step; requests still running end with an error."""
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()
        self.notify()
        try:
            await asyncio.to_thread(self._thread.join)
            await asyncio.to_thread(self._core.close)
        finally:
            self._threads.release()

    def check_capacity(self, count: int = 1, tenant: str = "public", adapters: Iterable[WeightedAdapter] = ()) -> None:
        """Raise Overloaded if `count` more requests of these adapters of a tenant do not fit the queue, and others need
        not give way to them; InvalidRequest if they never will.
        """
        self._crowded_out(count, tenant, frozenset(adapter.digest for adapter in adapters))

    def _crowded_out(self, count: int, tenant: str, adapters: frozenset[str]) -> list[GenerationStream]:
        """Those who give way to so many more: see `queue_share`. Raises as `check_capacity`."""
        limit = self.info.max_running + self.info.max_queued
        if count > limit:
            raise InvalidRequest(f"The call makes {count} requests; the server holds {limit} at most. Ask for fewer.")
        missing = max(0, self._admitted + count - limit)
        found = giving_way(self._streams.values(), tenant, adapters, missing) if missing else []
        if len(found) < missing:
            raise Overloaded(f"{self._admitted} requests are running or queued and the limit is {limit}; retry later.")
        return found

    async def submit(self, request: GenerationRequest) -> GenerationStream:
        """Tokenise and queue a request.

        Raises InvalidRequest, ContextTooLong, Overloaded, EngineStopped or EngineStuck; then nothing is left of the
        request.
        """
        self._check_running()
        if request.request_id in self._streams or request.request_id in self._leaving:
            raise InvalidRequest("A request with this id is running.", code="duplicate_request_id")
        stream = GenerationStream(request, self.abort)
        for other in self._crowded_out(1, stream.tenant, stream.adapters):
            other.put(_failed(Overloaded("The queue is full, and this caller had most places in it; retry later.")))
            self.abort(other.request_id)
        self._streams[request.request_id] = stream
        self._admitted += 1
        self._core.prefetch(request.adapters)
        try:
            answer = await self._prepare(request)
        except BaseException:
            self._forget(request.request_id)
            raise
        stream.sequence = answer.sequence
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
            up=self.healthy(),
            seconds_since_step=self._liveness.seconds(),
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

    def merged(self, digest: str) -> bool:
        """Whether the adapter is in the base's own weights."""
        return self._core.merged.digest == digest

    async def merge_into_base(self, digest: str) -> None:
        """Merge an adapter into the base's weights until a request of anything else comes, and keep it resident for
        then. It takes a product of every changed weight's size, and their copy in host memory.

        Raises BaseInUse while others' requests run or wait; AdapterInvalid `feature_unsupported`; what loading raises.
        """
        weights = await asyncio.to_thread(self._core.loader.load, digest)
        await self._apply(self._core.scheduler.adapters.want, digest)
        await self._apply(lambda _: self._core.merge_into_base(weights), digest)

    async def take_out_of_base(self, digest: str) -> None:
        """The base's own weights again, every bit of them; nothing happens if another adapter is in them, or none."""
        await self._apply(lambda digest: self._core.merged.take_out() if self.merged(digest) else None, digest)

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
        """False if the engine thread is gone or stuck."""
        return self._thread.is_alive() and not self._failed and not self._liveness.stuck()

    def ready(self) -> bool:
        """False also while a step takes very long, or the engine ends."""
        return self.healthy() and not self._stopping and not self._liveness.slow()

    def notify(self) -> None:
        """Wake the engine thread (an adapter has arrived, or a request)."""
        with self._wake:
            self._wake.notify()

    async def _prepare(self, request: GenerationRequest) -> Answer:
        params, prompt = request.sampling, request.prompt
        check_alone(request.adapters)
        if isinstance(prompt, str):
            prompt = bounded(prompt, params.truncate, self.info, self.tokenizer)
            encode = self.tokenizer.encode
            special = request.add_special_tokens
            long = len(prompt) > LONG_TEXT
            tokens = await asyncio.to_thread(encode, prompt, special) if long else encode(prompt, special)
        else:
            tokens = list(prompt)
        if params.truncate is not None:
            tokens = tokens[max(0, len(tokens) - params.truncate) :]
        max_tokens = room_for(tokens, params, num_virtual_tokens(request.adapters), self.info)
        grammar = await asyncio.to_thread(self._grammars.compile, params.grammar) if params.grammar else None
        return Answer(
            Sequence(request, tokens, max_tokens, self.info.fingerprint, self.info.block_size),
            self.tokenizer.stream(tokens),
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            eos_ids=self._eos,
            grammar=grammar,
        )

    def _check_running(self) -> None:
        if self._stopping or self._failed:
            raise EngineStopped("The engine is not running. Send this request elsewhere, or again after a restart.")
        if self._liveness.slow():
            seconds = self._liveness.seconds()
            raise EngineStuck(f"The engine has made no step for {seconds:.0f} s. Send this request elsewhere.")

    def _post(self, command: Callable[[], Outputs]) -> None:
        with self._wake:
            if not self._inbox:
                self._liveness.waiting_since = time.monotonic()
            self._inbox.append(command)
            self._wake.notify()

    def _forget(self, request_id: str) -> bool:
        """Free the answer slot; the one place where a request stops counting."""
        if self._streams.pop(request_id, None) is None:
            return False
        self._admitted -= 1
        return True

    async def _apply(self, action: Callable[[str], None], digest: str) -> None:
        """Run an action on the engine thread, between two steps, and wait until it has taken effect.

        Raises the CodedError that the action raises.
        """
        loop = asyncio.get_running_loop()
        applied: asyncio.Future[None] = loop.create_future()
        self._applying.add(applied)
        applied.add_done_callback(self._applying.discard)

        def finish(error: CodedError | None) -> None:
            if applied.done():  # the caller may have left
                return
            if error is None:
                applied.set_result(None)
            else:
                applied.set_exception(error)

        def command() -> Outputs:
            error = None
            try:
                action(digest)
            except CodedError as raised:
                error = raised
            loop.call_soon_threadsafe(finish, error)
            return []

        self._check_running()
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
        error = EngineStopped("The engine stopped before this request was finished. Send it elsewhere, or again.")
        self._deliver([(request_id, _failed(error)) for request_id in list(self._streams)])
        self._refuse_applying(error)

    def _give_up(self) -> None:
        """On the event loop, while the engine thread is stuck: nobody waits for it; if it goes on, all are aborted."""
        error = EngineStuck("The engine is stuck and could not finish this request. Send it elsewhere, or again.")
        for request_id, stream in list(self._streams.items()):
            self.abort(request_id)
            stream.put(_failed(error))
        self._refuse_applying(error)

    def _refuse_applying(self, error: CodedError) -> None:
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
                    outputs += self._inbox[0]()
                    self._carried_out()
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

    def _carried_out(self) -> None:
        with self._wake:
            self._inbox.popleft()
            self._liveness.waiting_since = time.monotonic() if self._inbox else None

    def _rest(self) -> None:
        """Sleep while there is nothing to compute; woken by a request, an adapter that arrived, or the stop."""
        if not self._core.has_work:
            self._core.publish()
            self._core.check_integrity()
            while self._nothing_new() and self._core.prepare():
                pass
        elif not self._core.blocked:
            return
        with self._wake:
            if self._nothing_new():
                self._wake.wait()

    def _nothing_new(self) -> bool:
        return not self._inbox and not self._stopping and not self._core.has_arrivals

    def _send(self, outputs: Outputs) -> None:
        if outputs:
            self._call_on_loop(lambda: self._deliver(outputs))

    def _call_on_loop(self, callback: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)


def _failed(error: CodedError) -> StepOutput:
    return StepOutput(finish_reason=FinishReason.ERROR, error=error)
