"""Reading, deleting and placing adapters."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Response

from adapters_store import info
from adapters_store.errors import AdapterNotFound
from server.api.access import ADMIN, CHANGE, READ
from server.api.adapter_choice import resolve
from server.api.adapter_headers import IfMatch, NamePath, ReferencePath, digest_of, etag
from server.api.body import JsonRoute
from server.api.dependencies import Caller, CallerDep, ServicesDep
from server.api.file_answer import file_answer
from server.api.pins import release_deleted, release_replaced
from server.api.schemas.adapters import (
    AdapterInfo,
    AdapterList,
    Experts,
    RollbackRequest,
    VersionList,
    adapter_body,
    experts_body,
)
from server.api.schemas.errors import JSON_ERRORS, READ_ERRORS, error_responses
from server.api.services import Services
from server.api.writes import Write, WriteDep

router = APIRouter(route_class=JsonRoute, tags=["adapters"])

MAX_PAGE = 1000
FILES = Literal["adapter_config.json", "adapter_model.safetensors"]


@router.get("/adapters", responses=READ_ERRORS, dependencies=[READ])
async def list_adapters(
    services: ServicesDep,
    caller: CallerDep,
    cursor: Annotated[str | None, Query(max_length=512)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
) -> AdapterList:
    """One page by name; `next` is the `cursor` of the following one, or null."""
    page, following = await asyncio.to_thread(services.adapters.list, caller.tenant, cursor, limit)
    return AdapterList(adapters=await asyncio.to_thread(_bodies, services, caller, page), next=following)


@router.get("/adapters/{reference}", responses=READ_ERRORS, dependencies=[READ])
async def get_adapter(
    reference: ReferencePath, response: Response, services: ServicesDep, caller: CallerDep
) -> AdapterInfo:
    """The current version, or the one after `@`. The ETag is what If-Match takes."""
    body = await _info(reference, services, caller)
    response.headers["ETag"] = etag(body.digest)
    return body


async def _info(reference: str, services: Services, caller: Caller) -> AdapterInfo:
    await services.replicas.ensure(reference, caller.tenant)
    found = await asyncio.to_thread(services.adapters.info, reference, caller.tenant)
    return adapter_body(services, caller, found)


@router.get("/adapters/{name}/versions", responses=READ_ERRORS, dependencies=[READ])
async def list_versions(name: NamePath, services: ServicesDep, caller: CallerDep) -> VersionList:
    """All versions, deletions included."""
    await services.replicas.ensure(name, caller.tenant)
    found = await asyncio.to_thread(services.adapters.versions, name, caller.tenant)
    return VersionList(versions=await asyncio.to_thread(_bodies, services, caller, found))


def _bodies(services: Services, caller: Caller, found: Sequence[info.AdapterInfo]) -> list[AdapterInfo]:
    """Off the event loop: where files are is asked of the disk."""
    return [adapter_body(services, caller, each) for each in found]


@router.get("/adapters/{reference}/experts", responses=READ_ERRORS, dependencies=[READ])
async def get_experts(reference: ReferencePath, services: ServicesDep, caller: CallerDep) -> Experts:
    """How often each rank of a gated adapter (SMoRA) was chosen. The counts begin anew when it is evicted."""
    found = await _info(reference, services, caller)
    return experts_body(found, await services.engine.experts(found.digest))


@router.get(
    "/adapters/{reference}/files/{filename}",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}, "application/json": {}}}, **READ_ERRORS},
    dependencies=[READ],
)
async def get_file(
    reference: ReferencePath,
    filename: Annotated[FILES, Path()],
    services: ServicesDep,
    caller: CallerDep,
) -> Response:
    """The adapter as PEFT reads it."""
    await services.replicas.ensure(reference, caller.tenant)
    size, pieces = await asyncio.to_thread(services.adapters.open_file, reference, filename, caller.tenant)
    return file_answer(size, pieces, filename)


@router.delete(
    "/adapters/{name}",
    status_code=204,
    responses=error_responses(400, 403, 404, 409, 412, 422, 503, 507),
    dependencies=[CHANGE],
)
async def delete_adapter(name: NamePath, services: ServicesDep, caller: CallerDep, if_match: IfMatch = None) -> None:
    """Forget the name and its pin. Running requests finish on the content they began with."""
    await asyncio.to_thread(services.adapters.delete, name, caller.tenant, digest_of(if_match))
    await release_deleted(services, caller, name)


@router.post("/adapters/{name}/rollback", responses={**JSON_ERRORS, **error_responses(409, 507)}, dependencies=[CHANGE])
async def rollback(
    name: NamePath, body: RollbackRequest, services: ServicesDep, caller: CallerDep, write: WriteDep
) -> AdapterInfo:
    """Make an earlier version's content current again, as a new version."""
    found = await asyncio.to_thread(services.adapters.rollback, name, body.version, caller.tenant)
    write.made(found)
    await release_replaced(services, caller, name, found.version)
    return adapter_body(services, caller, found)


@router.post("/adapters/{reference}/warm", responses=READ_ERRORS, dependencies=[CHANGE])
async def warm(reference: ReferencePath, services: ServicesDep, caller: CallerDep, write: WriteDep) -> AdapterInfo:
    """Bring the adapter into device memory, before anybody asks for it."""
    await services.engine.warm(await _digest(reference, services, caller, write))
    return await _info(reference, services, caller)


@router.post("/adapters/{reference}/pin", responses=READ_ERRORS, dependencies=[ADMIN])
async def pin(reference: ReferencePath, services: ServicesDep, caller: CallerDep, write: WriteDep) -> AdapterInfo:
    """Bring this version into device memory and keep it there until it is unpinned, replaced or deleted."""
    found = await resolve(services, caller, reference, "reference")
    write.made(found)
    await services.engine.pin(found.digest)
    try:
        return await _info(f"{found.name}@{found.version}", services, caller)
    except AdapterNotFound:  # deleted, before or meanwhile; by its digest it is still found
        await release_deleted(services, caller, found.name)
        raise


@router.post("/adapters/{reference}/unpin", responses=READ_ERRORS, dependencies=[ADMIN])
async def unpin(reference: ReferencePath, services: ServicesDep, caller: CallerDep, write: WriteDep) -> AdapterInfo:
    """Let the adapter be evicted again."""
    await services.engine.unpin(await _digest(reference, services, caller, write))
    return await _info(reference, services, caller)


async def _digest(reference: str, services: Services, caller: Caller, write: Write) -> str:
    found = await resolve(services, caller, reference, "reference")
    write.made(found)
    return found.digest
