"""Limits of requests and tokens: whose they are, what an answer's headers say of them, and what a call has used."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from fastapi import Request

from server.api.context import add_answer_header
from server.api.dependencies import Caller
from server.api.services import Replicas
from server.engine.request import GenerationRequest, StepOutput
from server.errors import RateLimited, TokenLimited
from server.replicas.rate import Rate, Taken

CHARACTERS_PER_TOKEN = 4  # of a prompt that is not tokenised yet, about

_parsed = lru_cache(maxsize=1024)(Rate.parse)


async def take_request(request: Request, caller: Caller, replicas: Replicas) -> None:
    """Count a request of a key, or of an address where there are no keys. Raises RateLimited."""
    rate = _parsed(caller.rate_limit) if caller.rate_limit is not None else replicas.rate
    if rate is None:
        return
    address = request.client.host if request.client else "local"
    taken = await replicas.take(address if caller.key_id is None else f"key-{caller.key_id}", rate)
    _tell(request, "requests", taken)
    if taken.seconds:
        raise RateLimited(str(rate), taken.seconds)


async def take_tokens(request: Request, caller: Caller, limit: str, replicas: Replicas, amount: int) -> Taken:
    """Count tokens of a key whose `token_limit` is `limit`, if one more fits. Raises TokenLimited."""
    rate = _parsed(limit)
    taken = await replicas.take(f"tokens-{caller.key_id}", rate, amount)
    _tell(request, "tokens", taken)
    if taken.seconds:
        raise TokenLimited(str(rate), taken.seconds)
    return taken


class TokenTally:
    """Tokens of one call's prompts and answers. With a limit, an estimate is taken first and settled at the end.

    Requests that stand together and have one prompt count it once, as the answer's `usage` does.
    """

    def __init__(self, requests: Sequence[GenerationRequest], replicas: Replicas, taken: Taken | None) -> None:
        self._first = [
            index for index, each in enumerate(requests) if not index or each.prompt is not requests[index - 1].prompt
        ]
        self._replicas = replicas
        self._taken = taken
        self._used = 0

    @classmethod
    async def open(
        cls, request: Request, caller: Caller, replicas: Replicas, requests: Sequence[GenerationRequest]
    ) -> "TokenTally":
        """Raises TokenLimited if the key's tokens are used up. What is left may be less than what the call will use."""
        tally = cls(requests, replicas, None)
        if caller.token_limit is not None:
            amount = sum(_length(requests[index].prompt) for index in tally._first)
            amount += sum(each.sampling.max_tokens or 0 for each in requests)
            tally._taken = await take_tokens(request, caller, caller.token_limit, replicas, amount)
        return tally

    def output(self, index: int, output: StepOutput) -> None:
        """Of request `index`."""
        if output.prompt is not None and index in self._first:
            self._used += len(output.prompt.token_ids)
        self._used += output.token_id is not None

    def settle(self) -> None:
        """Give back what was taken and not used, or take what was used beyond it. Idempotent."""
        if self._taken is not None:
            self._replicas.settle(self._taken, self._used)
            self._taken = None


def _length(prompt: str | tuple[int, ...]) -> int:
    return -(-len(prompt) // CHARACTERS_PER_TOKEN) if isinstance(prompt, str) else len(prompt)


def _tell(request: Request, unit: Literal["requests", "tokens"], taken: Taken) -> None:
    """OpenAI's headers."""
    add_answer_header(request, f"x-ratelimit-limit-{unit}", str(taken.rate.limit))
    add_answer_header(request, f"x-ratelimit-remaining-{unit}", str(taken.remaining))
    add_answer_header(request, f"x-ratelimit-reset-{unit}", duration(taken.reset))


def duration(seconds: float) -> str:
    """As OpenAI writes it: `6m0s`, `1h0m2s`, `12ms`."""
    if 0 < seconds < 1:
        return f"{max(1, round(seconds * 1000))}ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest}s"
