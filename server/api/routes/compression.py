"""`POST /adapters/{reference}/compress` and `POST /compress`: smaller versions, measured before they are stored."""

from fastapi import APIRouter, Response

from adapters_store import info
from adapters_store.compression.jointly import JointRecipe
from adapters_store.compression.recipe import Bounds, Recipe
from server.api.access import CHANGE
from server.api.adapter_choice import resolve
from server.api.adapter_headers import ReferencePath, point_to
from server.api.body import JsonRoute
from server.api.dependencies import Caller, CallerDep, ServicesDep, UploadSlot
from server.api.pins import release_replaced
from server.api.schemas.adapters import (
    MAX_DIVERGENCE_OVER_INT8,
    CompressedAdapter,
    CompressedCollection,
    CompressRequest,
    JointCompressRequest,
    adapter_body,
)
from server.api.schemas.errors import JSON_ERRORS, error_responses
from server.api.services import Services
from server.api.writes import WriteDep

router = APIRouter(route_class=JsonRoute, tags=["adapters"], dependencies=[CHANGE])


@router.post(
    "/adapters/{reference}/compress",
    response_model=CompressedAdapter,
    responses={**JSON_ERRORS, **error_responses(409, 412, 500, 507)},
)
async def compress(
    reference: ReferencePath,
    body: CompressRequest,
    response: Response,
    services: ServicesDep,
    caller: CallerDep,
    write: WriteDep,
    _slot: UploadSlot,
) -> CompressedAdapter:
    """Store a compressed version, unless it is too lossy (422 `too_lossy`). The original stays a version of its name.

    The answer comes when the version is stored: it takes seconds, for the probe runs among the other requests.
    """
    source = await resolve(services, caller, reference, "reference")
    stored, created, errors = await services.compressor.compress(
        source,
        Recipe(body.dtype, body.rank, body.energy),
        Bounds(body.max_error, _max_divergence(body, services.engine.info.quantization)),
        target=body.target,
        replace=body.replace,
        probe=body.probe,
        tenant=caller.tenant,
    )
    write.made(stored)
    point_to(response, "adapters", stored)
    return await _answered(services, caller, stored, created, errors)


@router.post(
    "/compress",
    response_model=CompressedCollection,
    responses={**JSON_ERRORS, **error_responses(409, 412, 500, 507)},
)
async def compress_jointly(
    body: JointCompressRequest, services: ServicesDep, caller: CallerDep, write: WriteDep, _slot: UploadSlot
) -> CompressedCollection:
    """Store compressed versions of all adapters named, in shared bases, unless one would be too lossy.

    The answer comes when all are stored: seconds for small adapters, many minutes for large ranks on all modules.
    One collection at a time; another one gets 503 meanwhile.
    """
    write.name = ",".join(body.adapters)
    sources = [await resolve(services, caller, reference, "adapters") for reference in body.adapters]
    stored = await services.compressor.compress_jointly(
        sources,
        JointRecipe(body.method, body.rank, body.clusters),
        Bounds(body.max_error, _max_divergence(body, services.engine.info.quantization)),
        probe=body.probe,
        tenant=caller.tenant,
    )
    return CompressedCollection(adapters=[await _answered(services, caller, *each) for each in stored])


async def _answered(
    services: Services, caller: Caller, stored: info.AdapterInfo, created: bool, errors: dict[str, float]
) -> CompressedAdapter:
    if created:
        await release_replaced(services, caller, stored.name, stored.version)
    body = adapter_body(services, caller, stored).model_dump()
    return CompressedAdapter(**body, module_errors=errors, new=created)


def _max_divergence(body: CompressRequest | JointCompressRequest, quantization: str) -> float | None:
    """As the body says, `null` for no bound; without a word what suits the base."""
    if "max_divergence" in body.model_fields_set or quantization == "none":
        return body.max_divergence
    return MAX_DIVERGENCE_OVER_INT8
