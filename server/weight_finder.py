"""The weights of a merge found on the running engine: every trial is a few ordinary requests, and merges nothing."""

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from adapters_store.errors import AdapterInvalid
from adapters_store.merging.search import Found, WeightSearch
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.errors import EngineFailure
from server.patience import Stream, finished, submitted

AT_ONCE = 8  # examples in the batch at a time, so that others' requests find room beside them
Progress = Callable[[float], None]
Labelled = tuple[tuple[int, ...], int]  # tokens of prompt and answer, and where the answer begins


class Tokenizer(Protocol):
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


class Engine(Protocol):
    """What is needed of the engine."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    async def submit(self, request: GenerationRequest) -> Stream: ...


class WeightFinder:
    """Searches as LoRAHub does (`adapters_store.merging.search`). The engine adds weighted adapters exactly, so what
    is tried is the exact sum of the sources, whose loss is that of the answers' tokens."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def find(self, digests: Sequence[str], told: Mapping[str, Any], tenant: str, progress: Progress) -> Found:
        """One weight for each of `digests`, in nats per token of the answers.

        told: `examples`, `iterations` and `seed`, as `parameters.WeightSearch`; progress: is told the share done.
        Raises AdapterInvalid, and what the engine says of a request: ContextTooLong, NotReady, Overloaded.
        """
        if len(set(digests)) < len(digests):
            text = "A source is named twice. Name each once: its weight is what is searched for."
            raise AdapterInvalid(text, code="bad_parameter", param="sources")
        examples = await asyncio.to_thread(self._labelled, told["examples"])
        search = WeightSearch(len(digests), told["seed"])
        for trial in range(told["iterations"]):
            weights = search.ask()
            adapters = tuple(WeightedAdapter(d, w) for d, w in zip(digests, weights, strict=True) if w)
            # In six digits: what else is in the batch may turn the last bits, and so the search.
            search.tell(float(f"{await self._loss(examples, adapters, tenant):.6g}"))
            progress((trial + 1) / told["iterations"])
        return search.best

    def _labelled(self, examples: Sequence[Mapping[str, str]]) -> list[Labelled]:
        found = []
        for example in examples:
            prompt = self._engine.tokenizer.encode(example["prompt"])
            answer = self._engine.tokenizer.encode(example["answer"], add_special_tokens=False)
            if not prompt or not answer:
                text = "An example's prompt or answer has no tokens."
                raise AdapterInvalid(text, code="bad_parameter", param="parameters.examples")
            found.append(((*prompt, *answer), len(prompt)))
        return found

    async def _loss(self, examples: Sequence[Labelled], adapters: tuple[WeightedAdapter, ...], tenant: str) -> float:
        room = asyncio.Semaphore(AT_ONCE)

        async def one(example: Labelled) -> list[float]:
            async with room:
                return await self._logprobs(example, adapters, tenant)

        asked = [asyncio.ensure_future(one(example)) for example in examples]
        try:
            found = await asyncio.gather(*asked)
        finally:
            for each in asked:
                each.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        answers = [logprob for each in found for logprob in each]
        return -sum(answers) / len(answers)

    async def _logprobs(self, example: Labelled, adapters: tuple[WeightedAdapter, ...], tenant: str) -> list[float]:
        """Log probabilities of the answer's tokens."""
        tokens, start = example
        params = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=0)
        request = GenerationRequest(f"search-{secrets.token_hex(8)}", tokens, params, adapters, tenant)
        computed = await finished(await submitted(self._engine, request))
        if computed is None:
            raise EngineFailure("A trial of the search ended before it was computed.")
        return [logprob for logprob in computed.logprobs[start:] if logprob is not None]
