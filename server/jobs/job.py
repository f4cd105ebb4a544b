"""A job: what was asked for, how far it is, and how it ended."""

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from adapters_store.errors import CodedError

State = Literal["queued", "running", "done", "failed", "cancelled"]


class JobNotFound(CodedError):
    """No such job, or one of another tenant's, or one of long ago (404)."""

    status = 404
    code = "job_not_found"


class JobInterrupted(CodedError):
    """The job was cut off by the end of the server, time and again (503)."""

    status = 503
    code = "job_interrupted"


class JobCancelled(CodedError):
    """Somebody cancelled the job (409)."""

    status = 409
    code = "job_cancelled"


class JobCrashed(CodedError):
    """The process that did the work ended without a word (500)."""

    code = "job_crashed"


class WorkRefused(CodedError):
    """What the process that did the work has raised, with its status."""

    def __init__(self, message: str, *, status: int, code: str, param: str | None) -> None:
        super().__init__(message, code=code, param=param)
        self.status = status


@dataclass(slots=True, eq=False)
class Job:
    """kind: which work it is; order: what it is told, JSON; key: equal for equal work; progress: 0 to 1; result: of a
    job that is done, JSON; error: of one that failed; times are ISO 8601, UTC; attempts: how often it was begun."""

    tenant: str
    kind: str
    order: Mapping[str, Any]
    key: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: str = field(default_factory=lambda: now())
    attempts: int = 0
    state: State = "queued"
    progress: float = 0.0
    result: Mapping[str, Any] | None = None
    error: CodedError | None = None
    finished: str | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, state: State, result: Mapping[str, Any] | None = None, error: CodedError | None = None) -> None:
        """Once, at the end; whoever waits for it goes on."""
        self.state, self.result, self.error, self.finished = state, result, error, now()
        if state == "done":
            self.progress = 1.0
        self.ended.set()

    async def made(self) -> Mapping[str, Any]:
        """Its result, once it has ended. Raises what it failed with, or JobCancelled."""
        await self.ended.wait()
        if self.error is not None:
            raise self.error
        return self.result or {}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
