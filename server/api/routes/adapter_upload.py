"""`PUT /adapters/{name}`: the only way in for an adapter's bytes."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from server.api.access import CHANGE
from server.api.adapter_headers import IfMatch, NamePath, digest_of, point_to
from server.api.dependencies import CallerDep, ServicesDep, UploadBody, UploadSlots
from server.api.pins import release_replaced
from server.api.schemas.adapters import AdapterInfo, adapter_body
from server.api.schemas.errors import Responses, error_responses
from server.api.uploads import receive_upload
from server.api.writes import WriteDep

router = APIRouter(tags=["adapters"], dependencies=[CHANGE])

_PART = {"type": "string", "format": "binary"}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"config": _PART, "weights": _PART},
                    "required": ["config", "weights"],
                }
            }
        },
    }
}
_RESPONSES: Responses = {200: {"description": "The same content is already current.", "model": AdapterInfo}}
_ERRORS = error_responses(400, 401, 403, 404, 408, 409, 412, 413, 415, 422, 429, 500, 503, 507)


@router.put(
    "/adapters/{name}",
    status_code=201,
    response_model=AdapterInfo,
    responses={**_RESPONSES, **_ERRORS},
    openapi_extra=_BODY,
)
async def put_adapter(
    name: NamePath,
    request: Request,
    response: Response,
    services: ServicesDep,
    caller: CallerDep,
    write: WriteDep,
    _body: UploadBody,
    slots: UploadSlots,
    replace: bool = False,
    weights_sha256: Annotated[str | None, Query(max_length=128)] = None,
    if_match: IfMatch = None,
) -> AdapterInfo:
    """Store an adapter: `config` is adapter_config.json, `weights` adapter_model.safetensors.

    Other content under an existing name needs `If-Match: "<digest>"` or `?replace=true`.
    `weights_sha256` is the SHA-256 that the weights file must have, which is not the adapter's digest.
    Before it is stored the adapter is tried out on a short text; `proof` in the answer says what that showed.
    """
    expected = digest_of(if_match)
    async with receive_upload(request, services.settings) as upload, slots:
        stored, created = await services.intake.add(
            name, upload.config, upload.weights, tenant=caller.tenant, if_match=expected, replace=replace
        )
    write.made(stored)
    if created:
        await release_replaced(services, caller, stored.name, stored.version)
    response.status_code = 201 if created else 200
    point_to(response, "adapters", stored)
    return adapter_body(services, caller, stored)
