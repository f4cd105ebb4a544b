"""Drives an engine core step by step from a test, without the asyncio front."""

import threading
from collections.abc import Callable

from adapters_store.forms import AdapterWeights
from server.engine.answer import Answer
from server.engine.build import build_core
from server.engine.limits import BLOCK_SIZE, EngineLimits
from server.engine.request import GenerationRequest, StepOutput
from server.engine.sequence import Sequence
from server.engine.tokenizer import Tokenizer
from server.model.base import BaseModel


class CoreDriver:
    """An engine core whose steps the test takes; every step is followed by an integrity check."""

    def __init__(
        self,
        base: BaseModel,
        limits: EngineLimits,
        load: Callable[[str], AdapterWeights],
        quantization: str = "none",
        *,
        compiling: bool = False,
    ) -> None:
        self._arrived = threading.Event()
        self._base = base
        self._tokenizer = Tokenizer(base.tokenizer)
        self.core = build_core(base, limits, load, self._arrived.set, quantization, compiling=compiling)
        self.outputs: dict[str, list[StepOutput]] = {}

    def add(self, request: GenerationRequest) -> None:
        """Queue a request whose prompt is token ids and whose max_tokens and seed are given."""
        assert not isinstance(request.prompt, str)
        assert request.sampling.max_tokens is not None
        sequence = Sequence(request, request.prompt, request.sampling.max_tokens, self._base.fingerprint, BLOCK_SIZE)
        text = self._tokenizer.stream(list(request.prompt))
        answer = Answer(sequence, text, seed=request.sampling.seed or 0, eos_ids=self._base.eos_token_ids, grammar=None)
        self.outputs[request.request_id] = []
        self._record(self.core.add(answer))

    def abort(self, request_id: str) -> None:
        self._record(self.core.abort(request_id))
        self.core.check_integrity()

    def step(self) -> None:
        """One step; if only an adapter's arrival can help, wait for it first."""
        if self.core.blocked and not self.core.has_arrivals:
            assert self._arrived.wait(timeout=60), "the engine waits for an adapter that never arrives"
        self._arrived.clear()
        self._record(self.core.step())
        self.core.check_integrity()

    def drain(self, limit: int = 10_000) -> None:
        """Step until nothing is left to do."""
        for _ in range(limit):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def run(self, request: GenerationRequest) -> list[StepOutput]:
        """One request by itself."""
        self.add(request)
        self.drain()
        return self.outputs[request.request_id]

    def _record(self, outputs: list[tuple[str, StepOutput]]) -> None:
        for request_id, output in outputs:
            self.outputs[request_id].append(output)


def tokens(outputs: list[StepOutput]) -> list[int]:
    return [output.token_id for output in outputs if output.token_id is not None]


def logprobs(outputs: list[StepOutput]) -> list[float]:
    return [output.logprob for output in outputs if output.logprob is not None]
