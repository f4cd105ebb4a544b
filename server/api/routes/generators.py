"""`/generators`: models that make adapters (ICM-LoRA): trained as jobs, kept as versions, asked for adapters."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from adapters_store import generators
from adapters_store.generation.orders import NEW_TOKENS, TaskSpec, Wanted
from server.api.access import CHANGE, READ
from server.api.adapter_choice import resolve
from server.api.adapter_headers import IfMatch, NamePath, ReferencePath, digest_of, etag, point_to
from server.api.body import JsonRoute
from server.api.dependencies import Caller, CallerDep, ServicesDep, UploadBody, UploadSlot, UploadSlots
from server.api.engine_work import EngineWork, charge, submit_charged
from server.api.file_answer import file_answer
from server.api.schemas.adapters import AdapterInfo, adapter_body
from server.api.schemas.errors import JSON_ERRORS, READ_ERRORS, Responses, error_responses
from server.api.schemas.generators import GeneratorInfo, GeneratorList, SynthesizeRequest, TaskRequest, TrainRequest
from server.api.schemas.jobs import JobInfo, job_body
from server.api.services import Services
from server.api.uploads import receive_file
from server.api.writes import WriteDep
from server.jobs.job import Job

router = APIRouter(route_class=JsonRoute, tags=["generators"])

KIND = "generate"
MAX_PAGE = 1000
FILE = "generator.safetensors"
_TRAINED: Responses = {
    200: {"description": "With `wait`: the same generator is already current.", "model": GeneratorInfo},
    201: {"description": "With `wait`: the new version.", "model": GeneratorInfo},
}
_UPLOADED: Responses = {200: {"description": "The same file is already current.", "model": GeneratorInfo}}
_MADE: Responses = {200: {"description": "The same adapter is already current.", "model": AdapterInfo}}
_FILE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "/generators",
    status_code=202,
    response_model=JobInfo | GeneratorInfo,
    responses={**_TRAINED, **JSON_ERRORS, **error_responses(409, 412, 429, 500, 507)},
    dependencies=[CHANGE],
)
async def train_generator(
    body: TrainRequest,
    request: Request,
    response: Response,
    services: ServicesDep,
    caller: CallerDep,
    write: WriteDep,
    wait: Annotated[bool, Query(description="Answer when the version is stored; leaving does not cancel it.")] = False,
    replace: bool = False,
    if_match: IfMatch = None,
) -> JobInfo | GeneratorInfo:
    """Train a generator on adapters: 202 and the job, which `Location` names; 201 with `?wait=true`.

    The job's result is what `GET /generators/{reference}` says, with the loss curve. The same order gives the same
    digest, to the last bit only where conditions are given in numbers or the server has nothing else to do; where it is
    current already, the job is done at once.
    """
    write.name = body.name
    sources = [(await resolve(services, caller, each.adapter, "sources"), each.task) for each in body.sources]
    tasks = {task: await _task(services, caller, task, told) for task, told in body.tasks.items()}
    planned = await asyncio.to_thread(
        services.trainer.plan,
        body.name,
        sources,
        tasks,
        body.settings,
        tenant=caller.tenant,
        if_match=digest_of(if_match),
        replace=replace,
    )
    if planned.stored is not None:
        found = {**generator_body(planned.stored).model_dump(mode="json"), "new": False}
        job = services.jobs.add_done(caller.tenant, KIND, planned.order, planned.recipe, found)
    else:
        work = EngineWork([text for told in body.tasks.values() for text in told.examples or ()], new_tokens=NEW_TOKENS)
        job = await submit_charged(request, services, caller, KIND, body.name, planned, work)
    write.job = job.id
    if wait:
        stored, created = await _waited(services, caller, job)
        write.made(stored)
        return _stored(response, stored, created)
    response.headers["Location"] = f"/jobs/{job.id}"
    return job_body(job)


@router.get("/generators", responses=READ_ERRORS, dependencies=[READ])
async def list_generators(
    services: ServicesDep,
    caller: CallerDep,
    cursor: Annotated[str | None, Query(max_length=512)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
) -> GeneratorList:
    """One page by name; `next` is the `cursor` of the following one, or null."""
    page, following = await asyncio.to_thread(services.generators.list, caller.tenant, cursor, limit)
    return GeneratorList(generators=[generator_body(each) for each in page], next=following)


@router.get("/generators/{reference}", responses=READ_ERRORS, dependencies=[READ])
async def get_generator(
    reference: ReferencePath, response: Response, services: ServicesDep, caller: CallerDep
) -> GeneratorInfo:
    """The current version, or the one after `@`. The ETag is what If-Match takes."""
    found = await asyncio.to_thread(services.generators.info, reference, caller.tenant)
    response.headers["ETag"] = etag(found.digest)
    return generator_body(found)


@router.get(
    "/generators/{reference}/file",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}, **READ_ERRORS},
    dependencies=[READ],
)
async def get_generator_file(reference: ReferencePath, services: ServicesDep, caller: CallerDep) -> Response:
    """The generator as one safetensors file, which `PUT /generators/{name}` takes."""
    return file_answer(*await asyncio.to_thread(services.generators.open_file, reference, caller.tenant), FILE)


@router.put(
    "/generators/{name}",
    status_code=201,
    response_model=GeneratorInfo,
    responses={**_UPLOADED, **error_responses(400, 401, 403, 404, 408, 409, 412, 413, 415, 422, 429, 500, 503, 507)},
    openapi_extra=_FILE_BODY,
    dependencies=[CHANGE],
)
async def put_generator(
    name: NamePath,
    request: Request,
    response: Response,
    services: ServicesDep,
    caller: CallerDep,
    write: WriteDep,
    _body: UploadBody,
    slots: UploadSlots,
    replace: bool = False,
    if_match: IfMatch = None,
) -> GeneratorInfo:
    """Store a generator's file, which is the body: what `GET /generators/{reference}/file` gave, of the same base.

    Other content under an existing name needs `If-Match: "<digest>"` or `?replace=true`.
    """
    match = digest_of(if_match)
    async with receive_file(request, services.settings) as path, slots:
        stored, created = await asyncio.to_thread(
            services.generators.add,
            name,
            path,
            "upload",
            {"type": "upload"},
            tenant=caller.tenant,
            if_match=match,
            replace=replace,
        )
    write.made(stored)
    return _stored(response, stored, created)


@router.delete(
    "/generators/{name}",
    status_code=204,
    responses=error_responses(400, 401, 403, 404, 409, 412, 422, 503, 507),
    dependencies=[CHANGE],
)
async def delete_generator(name: NamePath, services: ServicesDep, caller: CallerDep, if_match: IfMatch = None) -> None:
    """Forget the name. Adapters that the generator has made stay, and keep its file."""
    await asyncio.to_thread(services.generators.delete, name, caller.tenant, digest_of(if_match))


@router.post(
    "/generators/{reference}/adapters",
    status_code=201,
    response_model=AdapterInfo,
    responses={**_MADE, **JSON_ERRORS, **error_responses(409, 412, 429, 500, 507)},
    dependencies=[CHANGE],
)
async def synthesize(
    reference: ReferencePath,
    body: SynthesizeRequest,
    request: Request,
    response: Response,
    services: ServicesDep,
    caller: CallerDep,
    write: WriteDep,
    _slot: UploadSlot,
    replace: bool = False,
    if_match: IfMatch = None,
) -> AdapterInfo:
    """Make an adapter and store it as a recipe of some kilobytes, from which it is made anew whenever it is loaded.

    It is tried out as an upload is (`proof`). The same order gives the same digest. Other content under an existing
    name needs `If-Match: "<digest>"` or `?replace=true`.
    """
    match = digest_of(if_match)
    write.name = body.name
    generator = await asyncio.to_thread(services.generators.info, reference, caller.tenant)
    adapter = await resolve(services, caller, body.with_adapter, "with_adapter") if body.with_adapter else None
    wanted = Wanted(
        body.task,
        body.condition,
        body.examples,
        adapter,
        body.statistics_of,
        body.seed,
        body.z,
        body.reconstruct,
    )
    await charge(request, services, caller, EngineWork(body.examples or (), new_tokens=NEW_TOKENS))
    stored, created = await services.synthesizer.synthesize(
        generator, body.name, wanted, tenant=caller.tenant, if_match=match, replace=replace
    )
    write.made(stored)
    response.status_code = 201 if created else 200
    point_to(response, "adapters", stored)
    return adapter_body(services, caller, stored)


def generator_body(found: generators.GeneratorInfo) -> GeneratorInfo:
    return GeneratorInfo.model_validate(found)


async def _task(services: Services, caller: Caller, task: str, told: TaskRequest) -> TaskSpec:
    adapter = told.with_adapter and await resolve(
        services, caller, told.with_adapter, f"tasks.{task[:64]}.with_adapter"
    )
    return TaskSpec(told.condition, told.examples, adapter or None)


async def _waited(services: Services, caller: Caller, job: Job) -> tuple[generators.GeneratorInfo, bool]:
    """The version that the job has made, and whether it is new. Raises what the job has failed with."""
    made = await job.made()
    found = await asyncio.to_thread(services.generators.info, f"{made['name']}@{made['version']}", caller.tenant)
    return found, bool(made["new"])


def _stored(response: Response, found: generators.GeneratorInfo, created: bool) -> GeneratorInfo:
    response.status_code = 201 if created else 200
    point_to(response, "generators", found)
    return generator_body(found)
