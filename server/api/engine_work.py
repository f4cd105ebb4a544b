"""What routes that change adapters let the engine compute: charged as generation is, by an estimate, at the request."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request

from adapters_store.errors import CodedError
from server.api.dependencies import Caller
from server.api.services import Services, Tokenizer
from server.api.usage_limits import take_request, take_tokens
from server.jobs.job import Job
from server.replicas.rate import Taken


@dataclass(frozen=True, slots=True)
class EngineWork:
    """texts: that the engine computes, each `times` times; new_tokens: that are generated after each, at most."""

    texts: Sequence[str]
    times: int = 1
    new_tokens: int = 0


class Order(Protocol):
    """A job that may begin, and the digest of all that its result depends on."""

    @property
    def order(self) -> Mapping[str, Any]: ...
    @property
    def recipe(self) -> str: ...


async def charge(request: Request, services: Services, caller: Caller, work: EngineWork) -> Taken | None:
    """One request and the work's tokens; nothing where there is no work. None if the key's tokens are not limited.

    It is kept also where the work fails, for then the engine may have computed all of it. Raises RateLimited,
    TokenLimited.
    """
    if not work.texts:
        return None
    await take_request(request, caller, services.replicas)
    if caller.token_limit is None:
        return None
    tokens = await asyncio.to_thread(_count, services.engine.tokenizer, work)
    return await take_tokens(request, caller, caller.token_limit, services.replicas, tokens)


async def submit_charged(
    request: Request, services: Services, caller: Caller, kind: str, name: str, planned: Order, work: EngineWork
) -> Job:
    """The job, charged. Its tokens are given back where it is not taken, or an equal one, charged before, is.

    name: of what it makes. Raises RateLimited, TokenLimited, and what `Jobs.submit` raises.
    """
    taken = await charge(request, services, caller, work)
    try:
        job = await services.jobs.submit(caller.tenant, kind, planned.order, f"{name}:{planned.recipe}")
    except CodedError:
        _give_back(services, taken)
        raise
    if job.order is not planned.order:
        _give_back(services, taken)
    return job


def _count(tokenizer: Tokenizer, work: EngineWork) -> int:
    return work.times * sum(len(tokenizer.encode(text)) + work.new_tokens for text in work.texts)


def _give_back(services: Services, taken: Taken | None) -> None:
    if taken is not None:
        services.replicas.settle(taken, 0)
