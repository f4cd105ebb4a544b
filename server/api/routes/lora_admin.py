"""vLLM's routes for loading and unloading adapters, for tools that speak them."""

import asyncio
from contextlib import ExitStack

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from adapters_store.errors import AdapterConflict, AdapterInvalid, AdapterNotFound
from adapters_store.info import AdapterInfo
from server.api.access import ADMIN
from server.api.body import JsonRoute
from server.api.dependencies import Caller, CallerDep, ServicesDep, UploadSlot
from server.api.disconnect import to_the_end
from server.api.errors import AlreadyLoaded
from server.api.local_source import local_adapter
from server.api.pins import release_deleted, release_replaced
from server.api.schemas.adapters import LoadAdapterRequest, UnloadAdapterRequest
from server.api.schemas.errors import JSON_ERRORS, Responses, error_responses
from server.api.services import Services
from server.api.writes import WriteDep

router = APIRouter(route_class=JsonRoute, tags=["adapters"], dependencies=[ADMIN])

_TEXT: Responses = {200: {"content": {"text/plain": {}}}}


@router.post(
    "/v1/load_lora_adapter",
    response_class=Response,
    responses={**_TEXT, **JSON_ERRORS, **error_responses(403, 429, 507)},
)
async def load_lora_adapter(
    body: LoadAdapterRequest, services: ServicesDep, caller: CallerDep, write: WriteDep, _slot: UploadSlot
) -> PlainTextResponse:
    """Store the adapter in a folder of the server. Loading the same content again is no error; other content is."""
    write.name = body.lora_name
    try:
        stored, created = await _add(body, services, caller)
    except AdapterConflict as error:
        text = (
            f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True."
        )
        raise AlreadyLoaded(text, param="lora_name") from error
    write.made(stored)
    if created:
        await release_replaced(services, caller, stored.name, stored.version)
    if body.pinned:
        await services.engine.pin(stored.digest)
    return PlainTextResponse(f"Success: LoRA adapter '{stored.name}' added successfully.")


async def _add(body: LoadAdapterRequest, services: Services, caller: Caller) -> tuple[AdapterInfo, bool]:
    with ExitStack() as stack:
        opening = asyncio.to_thread(stack.enter_context, local_adapter(body.lora_path, services.settings))
        found = await to_the_end(opening)  # the copy must be whole, or gone, before the stack is closed
        return await services.intake.add(
            body.lora_name, found.config, found.weights, tenant=caller.tenant, replace=body.load_inplace
        )


@router.post(
    "/v1/unload_lora_adapter",
    response_class=Response,
    responses={**_TEXT, **JSON_ERRORS, **error_responses(409, 507)},
)
async def unload_lora_adapter(
    body: UnloadAdapterRequest, services: ServicesDep, caller: CallerDep, write: WriteDep
) -> PlainTextResponse:
    """Delete the adapter's name, as `DELETE /adapters/{name}`."""
    write.name = body.lora_name
    try:
        await asyncio.to_thread(services.adapters.delete, body.lora_name, caller.tenant)
    except (AdapterNotFound, AdapterInvalid):
        text = f"The lora adapter '{body.lora_name[:128]}' cannot be found."
        raise AdapterNotFound(text, param="lora_name") from None
    await release_deleted(services, caller, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
