"""What every route takes: the services, and who is asking."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import Depends, Request

from adapters_store.names import PUBLIC, check_tenant
from server.access.key import SCOPES, Scope
from server.api.services import Services
from server.errors import InvalidKey, InvalidRequest, MissingKey, MissingScope, Overloaded

CALLER = "polyrank.caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, fixed for the request. Without keys everybody is the public tenant and may do all.

    tenant: whose adapters the caller has beside the public ones, and where it writes; key_id: of its API key, which may
    be told to its owner, or None without keys; scopes: what it may do; rate_limit, token_limit: requests and tokens
    that the key is granted, as `Rate.parse` reads them (`60/minute`), or None.
    """

    tenant: str = PUBLIC
    key_id: str | None = None
    scopes: frozenset[Scope] = SCOPES
    rate_limit: str | None = None
    token_limit: str | None = None


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def get_services(request: Request) -> Services:
    """Asynchronous only because FastAPI gives each plain dependency a thread, which costs more than the look-up."""
    return services_of(request)


async def authorise(request: Request) -> Caller:
    """Who asks, found once for a request. Every route that does not say it is open comes here (`server.api.access`).

    Raises MissingKey, InvalidKey, NotReady; MissingScope or InvalidRequest for another tenant's name in `X-Tenant`.
    """
    caller: Caller | None = request.scope.get(CALLER)
    if caller is None:
        caller = request.scope[CALLER] = _for_tenant(_identify(request), request.headers.getlist("x-tenant"))
    return caller


def _identify(request: Request) -> Caller:
    """By the key in `Authorization: Bearer` or `X-API-Key`. Two different ones are as wrong as one that is wrong."""
    keys = services_of(request).keys
    if keys is None:
        return Caller()
    sent = {value.strip() for value in request.headers.getlist("x-api-key")}
    for value in request.headers.getlist("authorization"):
        scheme, _, token = value.strip().partition(" ")
        sent |= {token.strip()} if scheme.lower() == "bearer" else set()
    sent.discard("")
    if not sent:
        raise MissingKey
    if len(sent) > 1:
        raise InvalidKey
    key = keys.find(sent.pop())
    return Caller(key.tenant, key.id, key.scopes, key.rate_limit, key.token_limit)


def _for_tenant(caller: Caller, wanted: Sequence[str]) -> Caller:
    """The caller, in another tenant's place where it is an admin and says so."""
    others = sorted(set(wanted) - {caller.tenant})
    if not others:
        return caller
    if "admin" not in caller.scopes:
        raise MissingScope("Only a key with the scope `admin` may act for another tenant.", param="X-Tenant")
    if len(set(wanted)) > 1:
        raise InvalidRequest("X-Tenant: names two tenants; send one.", param="X-Tenant")
    try:
        check_tenant(others[0])
    except ValueError as error:
        raise InvalidRequest(f"X-Tenant: {error}.", param="X-Tenant") from None
    return replace(caller, tenant=others[0])


ServicesDep = Annotated[Services, Depends(get_services)]
CallerDep = Annotated[Caller, Depends(authorise)]


async def upload_body(request: Request) -> AsyncIterator[None]:
    """One of many uploads that may arrive at a time: each holds a connection and a staged file."""
    limit = services_of(request).settings.max_upload_bodies
    state = request.app.state
    if state.upload_bodies >= limit:
        raise _too_many_uploads(limit)
    state.upload_bodies += 1
    try:
        yield
    finally:
        state.upload_bodies -= 1


async def get_upload_slots(request: Request) -> asyncio.Semaphore:
    """For the checking and storing of adapters. A body takes one once it is whole, so that slow ones hold none."""
    slots: asyncio.Semaphore = request.app.state.upload_slots
    return slots


async def upload_slot(request: Request) -> AsyncIterator[None]:
    """A slot now, or a refusal, for an adapter that need not arrive first."""
    slots = await get_upload_slots(request)
    if slots.locked():
        raise _too_many_uploads(services_of(request).settings.max_uploads)
    async with slots:
        yield


def _too_many_uploads(limit: int) -> Overloaded:
    return Overloaded(f"{limit} uploads are under way, which is the limit. Try again soon.")


UploadBody = Annotated[None, Depends(upload_body)]
UploadSlots = Annotated[asyncio.Semaphore, Depends(get_upload_slots)]
UploadSlot = Annotated[None, Depends(upload_slot)]
