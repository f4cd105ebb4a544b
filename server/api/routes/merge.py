"""`POST /merge`: several adapters into one, as a job."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from adapters_store import info
from server.api.access import CHANGE
from server.api.adapter_choice import resolve
from server.api.adapter_headers import IfMatch, digest_of, point_to
from server.api.body import JsonRoute
from server.api.dependencies import Caller, CallerDep, ServicesDep
from server.api.engine_work import EngineWork, submit_charged
from server.api.schemas.adapters import AdapterInfo, adapter_body
from server.api.schemas.errors import JSON_ERRORS, Responses, error_responses
from server.api.schemas.jobs import JobInfo, MergeRequest, job_body
from server.api.services import Services
from server.api.writes import WriteDep
from server.jobs.job import Job

router = APIRouter(route_class=JsonRoute, tags=["adapters", "jobs"], dependencies=[CHANGE])

KIND = "merge"
_RESPONSES: Responses = {
    200: {"description": "With `wait`: the same merge is already current.", "model": AdapterInfo},
    201: {"description": "With `wait`: the new version.", "model": AdapterInfo},
}


@router.post(
    "/merge",
    status_code=202,
    response_model=JobInfo | AdapterInfo,
    responses={**_RESPONSES, **JSON_ERRORS, **error_responses(409, 412, 429, 500, 507)},
)
async def merge(
    body: MergeRequest,
    request: Request,
    response: Response,
    services: ServicesDep,
    caller: CallerDep,
    write: WriteDep,
    wait: Annotated[bool, Query(description="Answer when the version is stored; leaving does not cancel it.")] = False,
    replace: bool = False,
    if_match: IfMatch = None,
) -> JobInfo | AdapterInfo:
    """Merge adapters into the next version of a name: 202 and the job, which `Location` names; 201 with `?wait=true`.

    Other content under the name needs `If-Match: "<digest>"` or `?replace=true`. The same recipe gives the same digest:
    where it is current already, the job is done at once. Methods: lego, linear, cat, svd, task_arithmetic, ties,
    dare_linear, dare_ties, magnitude_prune, ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd, knots, tsv,
    core_space, iso_c, weight_search (finds the weights that make the answers of `examples` likeliest).
    """
    write.name = body.name
    await services.replicas.ensure(body.name, caller.tenant)
    sources = [(await resolve(services, caller, each.adapter, "sources"), each.weight) for each in body.sources]
    planned = await asyncio.to_thread(
        services.merger.plan,
        body.name,
        sources,
        body.method,
        body.parameters,
        tenant=caller.tenant,
        if_match=digest_of(if_match),
        replace=replace,
    )
    if planned.stored is not None:
        held = planned.stored
        found = {"name": held.name, "version": held.version, "digest": held.digest, "new": False}
        job = services.jobs.add_done(caller.tenant, KIND, planned.order, planned.recipe, found)
    else:
        work = _engine_work(planned.order["parameters"])
        job = await submit_charged(request, services, caller, KIND, body.name, planned, work)
    write.job = job.id
    if wait:
        stored = await _waited(services, caller, job, response)
        write.made(stored)
        return adapter_body(services, caller, stored)
    response.headers["Location"] = f"/jobs/{job.id}"
    return job_body(job)


def _engine_work(parameters: Mapping[str, Any]) -> EngineWork:
    """Of a search, which computes its examples for each set of weights; other methods have no examples."""
    texts = [text for each in parameters.get("examples", ()) for text in (each["prompt"], each["answer"])]
    return EngineWork(texts, times=parameters["iterations"]) if texts else EngineWork(())


async def _waited(services: Services, caller: Caller, job: Job, response: Response) -> info.AdapterInfo:
    """The version that the job has made. Raises what the job has failed with."""
    made = await job.made()
    stored = await asyncio.to_thread(services.adapters.info, f"{made['name']}@{made['version']}", caller.tenant)
    response.status_code = 201 if made["new"] else 200
    point_to(response, "adapters", stored)
    return stored
