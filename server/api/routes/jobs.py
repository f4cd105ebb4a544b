"""`/jobs`: work that takes longer than a request."""

from typing import Annotated

from fastapi import APIRouter, Path

from server.api.access import CHANGE, READ_JOBS
from server.api.dependencies import CallerDep, ServicesDep
from server.api.schemas.errors import READ_ERRORS
from server.api.schemas.jobs import JobInfo, JobList, job_body
from server.api.writes import WriteDep

router = APIRouter(tags=["jobs"])

JobPath = Annotated[str, Path(max_length=64, description="Id of a job, as its `Location` says.")]


@router.get("/jobs", responses=READ_ERRORS, dependencies=[READ_JOBS])
async def list_jobs(services: ServicesDep, caller: CallerDep) -> JobList:
    """The jobs of this server, newest first."""
    return JobList(jobs=[job_body(job) for job in services.jobs.list(caller.tenant)])


@router.get("/jobs/{job_id}", responses=READ_ERRORS, dependencies=[READ_JOBS])
async def get_job(job_id: JobPath, services: ServicesDep, caller: CallerDep) -> JobInfo:
    """How far a job is, or how it ended."""
    return job_body(services.jobs.get(caller.tenant, job_id))


@router.delete("/jobs/{job_id}", responses=READ_ERRORS, dependencies=[CHANGE])
async def cancel_job(job_id: JobPath, services: ServicesDep, caller: CallerDep, write: WriteDep) -> JobInfo:
    """Cancel a job: its process is killed and nothing is stored. One that has ended, or is just being stored, is left
    as it is; the answer says how it ended."""
    write.job = job_id
    return job_body(await services.jobs.cancel(caller.tenant, job_id))
