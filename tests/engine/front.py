"""An AsyncEngine over a scripted core.

Nothing here sleeps: where a step must be held back, the scripted model waits for a permit, and where a test must know
that a command has been carried out, it waits for a later request, as commands keep their order.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from server.engine import async_engine
from server.engine.answer import Answer
from server.engine.async_engine import AsyncEngine
from server.engine.batch import ScheduledBatch
from server.engine.grammar import GrammarCompiler
from server.engine.limits import STUCK_SECONDS
from server.engine.request import FinishReason, GenerationRequest, SamplingParams, StepOutput
from server.engine.sampler import Sampled
from server.engine.status import EngineInfo
from server.engine.stream import GenerationStream
from tests.engine import fakes
from tests.engine.fakes import FakeLoader, FakeRunner, tokenizer
from tests.engine.support import BLOCK, weighted
from tests.support.models import EOS_ID, VOCABULARY, tiny_tokenizer

PATIENCE = 60  # seconds until a test that hangs is failed; no test waits for it
CONTEXT = 64
PROMPT = [11, 12, 13, 14, 15]
HELD_TEXT = "x" * 30


class GatedRunner(FakeRunner):
    """Waits for a permit before each step while the gate is shut."""

    gate = threading.Semaphore(0)
    shut = False

    def run(self, batch: ScheduledBatch, answers: Mapping[str, Answer]) -> list[Sampled | None]:
        if self.shut:
            self.arrived.set()
            self.gate.acquire()
        return super().run(batch, answers)

    def close_gate(self) -> None:
        self.gate, self.arrived, self.shut = threading.Semaphore(0), threading.Event(), True

    def open_gate(self) -> None:
        self.shut = False
        self.gate.release()

    async def at_gate(self) -> None:
        """Returns when the engine thread stands in a step that cannot go on."""
        assert await asyncio.to_thread(self.arrived.wait, PATIENCE)


class SignallingLoader(FakeLoader):
    """Ends every load at once, or tells when one has been asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic = True
        self.asked = threading.Event()

    def start(self, digest: str) -> None:
        super().start(digest)
        if self.automatic:
            self.end(digest)
        self.asked.set()


@dataclass
class Front:
    """An AsyncEngine and its scripted parts."""

    engine: AsyncEngine
    fake: fakes.Engine
    runner: GatedRunner
    loader: SignallingLoader

    async def submit(
        self,
        request_id: str,
        prompt: Iterable[int] | str = PROMPT,
        sampling: SamplingParams | None = None,
        adapters: Iterable[str | tuple[str, float]] = (),
        tenant: str = "tenant",
    ) -> GenerationStream:
        content = prompt if isinstance(prompt, str) else tuple(prompt)
        params = sampling or SamplingParams(max_tokens=4)
        request = GenerationRequest(request_id, content, params, weighted(adapters), tenant=tenant)
        return await self.engine.submit(request)

    async def generate(self, request_id: str, *args: object, **options: object) -> list[StepOutput]:
        return await collect(await self.submit(request_id, *args, **options))  # type: ignore[arg-type]

    async def settle(self) -> None:
        """Every command given before has been carried out, and the engine is idle behind it."""
        outputs = await self.generate("settle", PROMPT, SamplingParams(max_tokens=1))
        assert outputs[-1].finish_reason is FinishReason.LENGTH

    def assert_idle(self) -> None:
        assert not self.fake.core.has_work
        self.fake.core.check_integrity()
        self.fake.scheduler.blocks.check_integrity([])
        assert self.engine._admitted == 0
        assert not self.engine._streams


class HeldEncode:
    """Tokenising of long text waits until `go`."""

    def __init__(self, own: Front, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.entered = threading.Event(), threading.Event()
        encode = own.engine.tokenizer.encode
        monkeypatch.setattr(async_engine, "LONG_TEXT", len(HELD_TEXT) - 1)

        def held(text: str, special: bool) -> list[int]:
            if text == HELD_TEXT:
                self.entered.set()
                assert self.go.wait(PATIENCE)
            return encode(text, special)

        monkeypatch.setattr(own.engine.tokenizer, "encode", held)

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, PATIENCE)


def front(
    *,
    blocks: int = 16,
    pages: int = 8,
    budget: int = 16,
    max_running: int = 8,
    max_queued: int = 50,
    stuck_seconds: float = STUCK_SECONDS,
) -> Front:
    fake = fakes.Engine(blocks=blocks, pages=pages, budget=budget, max_running=max_running)
    runner, loader = GatedRunner(fake.scheduler, fake.storage), SignallingLoader()
    fake.core._runner, fake.core.loader = runner, loader
    info = EngineInfo(
        model_id="fake",
        fingerprint="base",
        architecture="Fake",
        dtype="float32",
        device="cpu",
        quantization="none",
        vocabulary=VOCABULARY,
        max_context=min(CONTEXT, blocks * BLOCK),
        max_batch_tokens=budget,
        max_running=max_running,
        max_queued=max_queued,
        block_size=BLOCK,
        kv_blocks=blocks,
        adapter_memory_bytes=pages * 64,
        host_adapter_memory_bytes=1 << 20,
        device_memory_bytes=pages * 64,
    )
    grammars = GrammarCompiler(tiny_tokenizer(), VOCABULARY, (EOS_ID,))
    engine = AsyncEngine(fake.core, tokenizer(), grammars, info, (EOS_ID,), stuck_seconds)
    return Front(engine, fake, runner, loader)


@asynccontextmanager
async def running(*, stuck_seconds: float = STUCK_SECONDS, **sizes: int) -> AsyncIterator[Front]:
    """sizes: as for `front`."""
    own = front(stuck_seconds=stuck_seconds, **sizes)
    async with asyncio.timeout(PATIENCE):
        own.engine.start()
        try:
            yield own
        finally:
            own.runner.open_gate()
            await own.engine.stop()
    assert not own.runner.problems, own.runner.problems[0]


async def collect(stream: GenerationStream) -> list[StepOutput]:
    return [output async for output in stream]


def tokens(outputs: list[StepOutput]) -> list[int]:
    return [output.token_id for output in outputs if output.token_id is not None]
