"""An engine without a model: it answers with the prompt, byte by byte, and does what a test tells it to."""

import asyncio
import codecs
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self

from server.engine.request import (
    Candidate,
    FinishReason,
    GenerationRequest,
    PromptOutput,
    SamplingParams,
    StepOutput,
    WeightedAdapter,
)
from server.engine.status import EngineInfo, EngineStats, ExpertLoad, Residency, TokenizerFacts
from server.engine.stop import StopWatch
from server.errors import ContextTooLong, InvalidRequest, Overloaded

EOS, BOS, FIRST_BYTE = 0, 1, 3
VOCABULARY = 256 + FIRST_BYTE
MODEL_ID, ALIAS = "acme/tiny-base", "tiny"
FINGERPRINT = "f" * 64

Script = Callable[[GenerationRequest], AsyncIterator[StepOutput]]


class ByteTokenizer:
    """One token per byte; 0 is the end, 1 the beginning."""

    facts = TokenizerFacts("ByteTokenizer", "<s>", "</s>", "<pad>", None, None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + [byte + FIRST_BYTE for byte in text.encode()]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        text = b""
        for token in ids:
            special = b"" if skip_special_tokens else {EOS: b"</s>", BOS: b"<s>", 2: b"<pad>"}.get(token, b"")
            text += special if token < FIRST_BYTE else bytes([token - FIRST_BYTE])
        return text.decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def is_special(self, token_id: int) -> bool:
        return token_id < FIRST_BYTE

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        if messages[0]["role"] == "tool":
            raise InvalidRequest("The chat template refuses these messages: no tools", param="messages")
        text = "".join(f"{message['role']}:{message['content']}\n" for message in messages)
        return text + "assistant:" * add_generation_prompt


def logprob_of(token: int) -> float:
    return -0.1 - token % 7 / 10


def scored(token: int, count: int) -> tuple[Candidate, ...]:
    ids = [token, *(other for other in range(FIRST_BYTE + 97, VOCABULARY) if other != token)][:count]
    return tuple(Candidate(each, logprob_of(token) - 0.5 * place) for place, each in enumerate(ids))


class FakeStream:
    """Outputs of one request; remembers whether it was closed before its end."""

    def __init__(self, engine: "FakeEngine", request: GenerationRequest) -> None:
        self.request_id = request.request_id
        self.request = request
        self.finished = False
        self.aborted = False
        self._engine = engine
        self._outputs = engine.script(request)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StepOutput:
        if self.finished or self.aborted:
            raise StopAsyncIteration
        output = await anext(self._outputs)
        self.finished = output.finish_reason is not None
        if self.finished:
            self._engine.open.discard(self.request_id)
        return output

    async def aclose(self) -> None:
        self.aborted = self.aborted or not self.finished
        self._engine.open.discard(self.request_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class FakeEngine:
    """`script` says what a request gets; `open` holds the ids of those neither finished nor closed."""

    def __init__(self) -> None:
        self.info = EngineInfo(
            model_id=MODEL_ID,
            fingerprint=FINGERPRINT,
            architecture="FakeForCausalLM",
            dtype="float32",
            device="cpu",
            quantization="none",
            vocabulary=VOCABULARY,
            max_context=2048,
            max_batch_tokens=512,
            max_running=4,
            max_queued=4,
            block_size=16,
            kv_blocks=128,
            adapter_memory_bytes=1 << 20,
            host_adapter_memory_bytes=1 << 20,
            device_memory_bytes=1 << 21,
            aliases=(ALIAS,),
        )
        self.tokenizer = ByteTokenizer()
        self.current = EngineStats()
        self.script: Script = self.echo
        self.capacity = 64
        self.is_healthy = True
        self.is_ready = True
        self.refuse: Exception | None = None
        self.refuse_after = 0
        self.streams: list[FakeStream] = []
        self.open: set[str] = set()
        self.resident: set[str] = set()
        self.loading: set[str] = set()
        self.base_holds: str | None = None
        self.pins: set[str] = set()
        self.loads: dict[str, dict[str, ExpertLoad]] = {}

    @property
    def requests(self) -> list[GenerationRequest]:
        return [stream.request for stream in self.streams]

    @property
    def last(self) -> GenerationRequest:
        return self.streams[-1].request

    def stats(self) -> EngineStats:
        return self.current

    def healthy(self) -> bool:
        return self.is_healthy

    def ready(self) -> bool:
        return self.is_ready

    def check_capacity(self, count: int, tenant: str, adapters: Sequence[WeightedAdapter]) -> None:
        if count > self.capacity:
            raise Overloaded(f"The queue has room for {self.capacity} requests, not {count}.")

    async def submit(self, request: GenerationRequest) -> FakeStream:
        if self.refuse is not None and len(self.streams) >= self.refuse_after:
            raise self.refuse
        if request.request_id in {stream.request_id for stream in self.streams}:
            raise InvalidRequest("A request with this id is running.", code="duplicate_request_id")
        prompt = self.prompt_ids(request)
        room = self.info.max_context - len(prompt)
        if room < (request.sampling.max_tokens or 0):
            raise ContextTooLong(f"The context is {self.info.max_context} tokens.", param="max_tokens")
        stream = FakeStream(self, request)
        self.streams.append(stream)
        self.open.add(request.request_id)
        return stream

    def residency(self, digest: str) -> Residency:
        if digest in self.loading:
            return Residency.LOADING
        return Residency.RESIDENT if digest in self.resident else Residency.ABSENT

    def pinned(self, digest: str) -> bool:
        return digest in self.pins

    async def warm(self, digest: str) -> None:
        self.resident.add(digest)

    async def pin(self, digest: str) -> None:
        self.pins.add(digest)
        self.resident.add(digest)

    def merged(self, digest: str) -> bool:
        return self.base_holds == digest

    async def merge_into_base(self, digest: str) -> None:
        self.base_holds = digest

    async def take_out_of_base(self, digest: str) -> None:
        if self.base_holds == digest:
            self.base_holds = None

    async def experts(self, digest: str) -> dict[str, ExpertLoad]:
        return self.loads.get(digest, {}) if digest in self.resident else {}

    async def unpin(self, digest: str) -> None:
        self.pins.discard(digest)

    def prompt_ids(self, request: GenerationRequest) -> list[int]:
        prompt = request.prompt
        ids = self.tokenizer.encode(prompt, request.add_special_tokens) if isinstance(prompt, str) else list(prompt)
        return ids[-(request.sampling.truncate or len(ids)) :]

    def prompt_output(self, request: GenerationRequest) -> PromptOutput:
        ids = self.prompt_ids(request)
        count = request.sampling.prompt_logprobs
        if count is None:
            return PromptOutput(tuple(ids))
        logprobs = (None, *(logprob_of(token) for token in ids[1:]))
        return PromptOutput(tuple(ids), 0, logprobs, ((), *(scored(token, count) for token in ids[1:])))

    def answer_text(self, request: GenerationRequest) -> str:
        """Adapters show as `[digest*weight]`, a seed (if sampled) as a letter, then comes the prompt."""
        marks = "".join(f"[{adapter.digest[:4]}*{adapter.weight:g}]" for adapter in request.adapters)
        seed = request.sampling.seed or 0
        letter = chr(97 + seed % 26) if request.sampling.temperature > 0 else ""
        return marks + letter + self.tokenizer.decode(self.prompt_ids(request), skip_special_tokens=True)

    async def echo(self, request: GenerationRequest) -> AsyncIterator[StepOutput]:
        sampling, prompt = request.sampling, self.prompt_output(request)
        if sampling.max_tokens == 0:
            yield StepOutput(prompt=prompt, finish_reason=FinishReason.LENGTH)
            return
        tokens = [*self.tokenizer.encode(self.answer_text(request), add_special_tokens=False), EOS]
        if sampling.ignore_eos:
            tokens = (tokens[:-1] * (sampling.max_tokens or 1))[: sampling.max_tokens]
        watch = StopWatch(sampling.stop, include=sampling.include_stop)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for place, token in enumerate(tokens):
            piece = b"" if token == EOS else bytes([token - FIRST_BYTE])
            output = self._output(sampling, token, place + 1, watch, decoder.decode(piece))
            yield StepOutput(**output, prompt=prompt if place == 0 else None)
            if output["finish_reason"]:
                return
            await asyncio.sleep(0)

    def _output(self, sampling: SamplingParams, token: int, count: int, watch: StopWatch, text: str) -> dict[str, Any]:
        text = watch.push(text)
        reason: FinishReason | None = None
        if watch.matched is not None:
            reason = FinishReason.STOP
        elif token == EOS or count == sampling.max_tokens:
            reason = FinishReason.EOS if token == EOS else FinishReason.LENGTH
            text += watch.flush()
        return {
            "token_id": token,
            "text": text,
            "logprob": None if sampling.logprobs is None else logprob_of(token),
            "top": scored(token, sampling.logprobs or 0),
            "finish_reason": reason,
            "stop_reason": watch.matched,
        }
