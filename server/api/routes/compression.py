"""`POST /adapters/{reference}/compress`: a smaller version, measured before it is stored."""

from fastapi import APIRouter, Response

from adapters_store.compression.recipe import Bounds, Recipe
from server.api.adapter_choice import resolve
from server.api.adapter_headers import ReferencePath, etag
from server.api.body import JsonRoute
from server.api.dependencies import CallerDep, ServicesDep, UploadSlot
from server.api.pins import release_replaced
from server.api.schemas.adapters import (
    MAX_DIVERGENCE_OVER_INT8,
    CompressedAdapter,
    CompressRequest,
    adapter_body,
)
from server.api.schemas.errors import JSON_ERRORS, error_responses

router = APIRouter(route_class=JsonRoute, tags=["adapters"])


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
    _slot: UploadSlot,
) -> CompressedAdapter:
    """Store a compressed version, unless it is too lossy (422 `too_lossy`). The original stays a version of its name.

    The answer comes when the version is stored: it takes seconds, for the probe runs among the other requests.
    """
    source = resolve(services, caller, reference, "reference")
    stored, created, errors = await services.compressor.compress(
        source,
        Recipe(body.dtype, body.rank, body.energy),
        Bounds(body.max_error, _max_divergence(body, services.engine.info.quantization)),
        target=body.target,
        replace=body.replace,
        probe=body.probe,
    )
    if created:
        await release_replaced(services, caller, stored.name, stored.version)
    response.headers["ETag"] = etag(stored.digest)
    response.headers["Location"] = f"/adapters/{stored.name}@{stored.version}"
    body_of = adapter_body(services.engine, stored).model_dump()
    return CompressedAdapter(**body_of, module_errors=errors, new=created)


def _max_divergence(body: CompressRequest, quantization: str) -> float | None:
    """As the body says, `null` for no bound; without a word what suits the base."""
    if "max_divergence" in body.model_fields_set or quantization == "none":
        return body.max_divergence
    return MAX_DIVERGENCE_OVER_INT8
