"""`/adapters/{reference}/merge_into_base`: one adapter in the base's own weights, while nothing else is asked for."""

from fastapi import APIRouter

from adapters_store.errors import CodedError
from adapters_store.info import AdapterRef
from server.api.access import ADMIN
from server.api.adapter_choice import resolve
from server.api.adapter_headers import ReferencePath
from server.api.dependencies import Caller, CallerDep, ServicesDep
from server.api.schemas.adapters import AdapterInfo, adapter_body
from server.api.schemas.errors import READ_ERRORS, error_responses
from server.api.services import Services
from server.api.writes import Write, WriteDep

router = APIRouter(tags=["adapters"], dependencies=[ADMIN])


class MergeIntoBaseOff(CodedError):
    """The server was not started with `--merge-into-base` (403)."""

    status = 403
    code = "merge_into_base_off"


@router.post("/adapters/{reference}/merge_into_base", responses={**READ_ERRORS, **error_responses(403, 409, 422, 507)})
async def merge_into_base(
    reference: ReferencePath, services: ServicesDep, caller: CallerDep, write: WriteDep
) -> AdapterInfo:
    """Put a version into the base's weights: its requests then cost what base requests cost.

    Only while no other request runs or waits (409 `base_in_use`). The first request of anything else takes it out
    again, which restores every bit of the base from a copy; then this must be asked for again. For low-rank deltas of
    linears, on a base that is not rounded to int8. Off unless the server was started with `--merge-into-base`.
    """
    found = await _found(reference, services, caller, write)
    await services.engine.merge_into_base(found.digest)
    return _body(found, services, caller)


@router.delete("/adapters/{reference}/merge_into_base", responses={**READ_ERRORS, **error_responses(403)})
async def take_out_of_base(
    reference: ReferencePath, services: ServicesDep, caller: CallerDep, write: WriteDep
) -> AdapterInfo:
    """Take a version out of the base's weights; nothing happens if it is not there."""
    found = await _found(reference, services, caller, write)
    await services.engine.take_out_of_base(found.digest)
    return _body(found, services, caller)


async def _found(reference: str, services: Services, caller: Caller, write: Write) -> AdapterRef:
    if not services.settings.merges_into_base:
        raise MergeIntoBaseOff("Adapters go into the base's weights only if the server runs with `--merge-into-base`.")
    found = await resolve(services, caller, reference, "reference")
    write.made(found)
    return found


def _body(found: AdapterRef, services: Services, caller: Caller) -> AdapterInfo:
    """Of the name that was asked for: others may have the same content."""
    return adapter_body(services, caller, services.adapters.info(f"{found.name}@{found.version}", caller.tenant))
