"""Bodies of the routes of merges and jobs."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.api.errors import openai_body
from server.api.schemas.errors import ErrorDetail
from server.api.schemas.sampling import ReferenceText, Strict, Weight
from server.jobs.job import Job

MAX_SOURCES = 64
MAX_PARAMETERS = 32
MERGE_EXAMPLE: dict[str, Any] = {
    "name": "law-and-verse",
    "method": "lego",
    "sources": [{"adapter": "legal"}, {"adapter": "poet@2", "weight": 0.5}],
    "parameters": {"rank": 8},
}


class MergeSource(Strict):
    """An adapter to merge, by any reference, and its weight."""

    model_config = ConfigDict(strict=True, extra="forbid")

    adapter: Annotated[ReferenceText, Field(min_length=1)]
    weight: Weight = 1.0


class MergeRequest(Strict):
    """What to merge into the next version of `name`. The parameters are the method's own; it refuses what it does not
    know (422)."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra={"examples": [MERGE_EXAMPLE]})

    name: Annotated[str, Field(min_length=1, max_length=512)]
    method: Annotated[str, Field(min_length=1, max_length=64)]
    sources: Annotated[list[MergeSource], Field(min_length=1, max_length=MAX_SOURCES)]
    parameters: Annotated[dict[str, Any], Field(max_length=MAX_PARAMETERS, default_factory=dict)]


class JobInfo(BaseModel):
    """A job. progress: 0 to 1; result: of one that is done, of a merge `name`, `version`, `digest` and `new`; error: of
    one that failed or was cancelled; times in ISO 8601, UTC."""

    id: str
    kind: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    progress: float
    created: str
    finished: str | None
    result: dict[str, Any] | None
    error: ErrorDetail | None


class JobList(BaseModel):
    """The caller's jobs on this server, newest first; of finished ones the last few hundred."""

    jobs: list[JobInfo]


def job_body(job: Job) -> JobInfo:
    return JobInfo(
        id=job.id,
        kind=job.kind,
        state=job.state,
        progress=round(job.progress, 4),
        created=job.created,
        finished=job.finished,
        result=dict(job.result) if job.result is not None else None,
        error=ErrorDetail(**openai_body(job.error)["error"]) if job.error is not None else None,
    )
