"""The queue of jobs: one at a time, tenants in turn, each known by its id until others have pushed it out.

A job that is not finished stands in the store as a note. The server that took it begins it again after a restart.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapters_store.errors import CodedError, write_error
from adapters_store.notes import Notes
from server.errors import NotReady, Overloaded
from server.jobs import folders, process
from server.jobs.fair_queue import FairQueue
from server.jobs.job import Job, JobCancelled, JobCrashed, JobInterrupted, JobNotFound, State

MAX_QUEUED = 64
MAX_QUEUED_OF_TENANT = 16
HISTORY = 256  # finished jobs that are still told of
MAX_ATTEMPTS = 3  # then a job is suspected of killing the server
PREPARED, WORKED = 0.05, 0.95  # of the progress
Progress = Callable[[float], None]
Work = Callable[[str, Path, Mapping[str, Any], Progress], Awaitable[dict[str, Any]]]

log = logging.getLogger(__name__)


class Kind(Protocol):
    """What a kind of job is. module: the one whose `run(folder, order, progress)` does the work in another process."""

    module: str

    async def prepare(self, tenant: str, order: Mapping[str, Any], folder: Path, progress: Progress) -> None:
        """Puts into the folder what the work needs. progress: for what takes long, the share of the whole job that is
        done; the work takes the rest. Raises CodedError."""

    async def finish(
        self, tenant: str, order: Mapping[str, Any], folder: Path, told: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Makes what the work has left in the folder last; the job's result. Raises CodedError."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where jobs are kept. notes: of unfinished ones; owner: whose notes are this server's, equal after a restart;
    room: a folder on this machine for their files."""

    notes: Notes
    owner: str
    room: Path


class Jobs:
    """To be used on one event loop, between `start` and `stop`."""

    def __init__(
        self,
        kinds: Mapping[str, Kind],
        place: Place,
        work: Work = process.run,
        ended: Callable[[Job], None] | None = None,
    ) -> None:
        """ended: is told of each job at its end; it may block."""
        self._ended = ended
        self._kinds = kinds
        self._place = place
        self._work = work
        self._jobs: dict[str, Job] = {}  # unfinished and finished, in the order they came
        self._queue = FairQueue()
        self._filled = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._unwanted: set[str] = set()  # ids of jobs that are being cancelled
        self._current: tuple[Job, asyncio.Task[None]] | None = None
        self._settling = False  # the result is being stored, or the end told

    async def start(self) -> None:
        """Takes up what an earlier server left, and begins."""
        try:
            await asyncio.to_thread(folders.sweep, self._place.room)
            await self._restore()
        except (OSError, CodedError):
            log.exception("jobs_not_restored")
        self._loop = asyncio.create_task(self._run(), name="jobs")

    async def stop(self) -> None:
        """Kills the work that runs; it is begun again by the next server, as what is queued is."""
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
            self._loop = None

    async def submit(self, tenant: str, kind: str, order: Mapping[str, Any], key: str) -> Job:
        """A new job, or the unfinished one of the same kind and key. Raises Overloaded, NotReady, StoreUnavailable."""
        for job in self._jobs.values():
            is_wanted = not job.ended.is_set() and job.id not in self._unwanted
            if is_wanted and (job.tenant, job.kind, job.key) == (tenant, kind, key):
                return job
        if self._loop is None:
            raise NotReady("The server is stopping and takes no jobs. Send this one elsewhere, or again.")
        self._require_room(tenant)
        job = Job(tenant, kind, order, key)
        self._jobs[job.id] = job
        try:
            await asyncio.to_thread(self._note, job)
        except CodedError as error:
            job.end("failed", error=error)
            raise
        except asyncio.CancelledError:  # whoever sent it has gone; another may wait for it already
            self._enqueue(job)
            raise
        if job.id in self._unwanted:
            await self._end(job, "cancelled", error=_cancelled())
        else:
            self._enqueue(job)
        return job

    def counts(self) -> dict[tuple[str, str], int]:
        """How many jobs are known, by kind and state. From any thread."""
        return dict(Counter((job.kind, job.state) for job in tuple(self._jobs.values())))

    def add_done(self, tenant: str, kind: str, order: Mapping[str, Any], key: str, result: Mapping[str, Any]) -> Job:
        """A job whose result was there already."""
        job = Job(tenant, kind, order, key)
        job.end("done", result)
        self._jobs[job.id] = job
        self._forget()
        return job

    def get(self, tenant: str, job_id: str) -> Job:
        """Raises JobNotFound."""
        job = self._jobs.get(job_id)
        if job is None or job.tenant != tenant:
            text = "There is no such job: this server never had it, or others have finished since."
            raise JobNotFound(text, param="id")
        return job

    def list(self, tenant: str) -> Sequence[Job]:
        """Newest first."""
        return [job for job in reversed(self._jobs.values()) if job.tenant == tenant]

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """Ends a job that is queued or at work; one whose result is being stored, or finished, is left as it is."""
        job = self.get(tenant, job_id)
        is_current = self._current is not None and self._current[0] is job
        if not job.ended.is_set() and not (is_current and self._settling):
            self._unwanted.add(job_id)
        if self._queue.remove(job):
            await self._end(job, "cancelled", error=_cancelled())
        elif self._current is not None and is_current and not self._settling:
            self._current[1].cancel()
        await job.ended.wait()
        return job

    async def _run(self) -> None:
        while True:
            while not self._queue:
                self._filled.clear()
                await self._filled.wait()
            job = self._queue.pop()
            if job.id in self._unwanted:
                await self._end(job, "cancelled", error=_cancelled())
                continue
            self._settling = False
            task = asyncio.create_task(self._one(job), name=f"job-{job.id}")
            self._current = job, task
            try:
                await asyncio.wait({task})
                if not job.ended.is_set():  # cancelled before its first step
                    await self._end(job, "cancelled", error=_cancelled())
            finally:
                self._current = None
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _restore(self) -> None:
        """What this server had not finished when it ended, each tenant's in the order it came."""
        notes = await asyncio.to_thread(self._place.notes.all)
        own = {key: note for key, note in notes.items() if note.get("owner") == self._place.owner}
        for job_id, note in sorted(own.items(), key=lambda item: str(item[1].get("created"))):
            fields = {name: note[name] for name in ("tenant", "kind", "order", "key", "created", "attempts")}
            job = Job(**fields, id=job_id)
            self._jobs[job_id] = job
            if job.attempts >= MAX_ATTEMPTS or job.kind not in self._kinds:
                text = f"The server ended {job.attempts} times while this job ran. It is not begun again."
                await self._end(job, "failed", error=JobInterrupted(text))
            else:
                self._enqueue(job)

    async def _one(self, job: Job) -> None:
        """From the queue to the end. Cancelled by `cancel`, it ends the job; by `stop`, it leaves its note."""
        state: State = "done"
        result: dict[str, Any] | None = None
        error: CodedError | None = None
        try:
            result = await self._worked(job)
        except asyncio.CancelledError:
            if self._loop is None or self._loop.cancelling():
                job.state = "queued"
                raise
            state, error = "cancelled", _cancelled()
        except Exception as failure:
            state, error = "failed", _failure(job, failure)
        self._settling = True
        await self._end(job, state, result, error)

    async def _worked(self, job: Job) -> dict[str, Any]:
        kind = self._kinds[job.kind]
        job.state, job.attempts = "running", job.attempts + 1
        await asyncio.to_thread(self._note, job)

        def prepared(done: float) -> None:
            job.progress = min(max(done, job.progress), WORKED)

        with folders.job_folder(self._place.room) as folder:
            await kind.prepare(job.tenant, job.order, folder, prepared)
            prepared(PREPARED)
            begun = job.progress

            def worked(done: float) -> None:
                job.progress = begun + (WORKED - begun) * min(max(done, 0.0), 1.0)

            told = await self._work(kind.module, folder, job.order, worked)
            self._settling = True
            return await kind.finish(job.tenant, job.order, folder, told)

    async def _end(
        self, job: Job, state: State, result: dict[str, Any] | None = None, error: CodedError | None = None
    ) -> None:
        await self._remove_note(job)
        job.end(state, result, error)
        self._unwanted.discard(job.id)
        self._forget()
        facts = {"job": job.id, "kind": job.kind, "state": state, "code": error.code if error else None}
        log.info("job_ended", extra=facts)
        if self._ended is not None:
            await asyncio.to_thread(self._ended, job)

    async def _remove_note(self, job: Job) -> None:
        try:
            await asyncio.to_thread(self._place.notes.remove, job.id)
        except CodedError:  # it will be begun again after a restart, and find its result there
            log.warning("job_note_left", extra={"job": job.id})

    def _require_room(self, tenant: str) -> None:
        """Those count that are still being noted, so that many at once do not pass. Raises Overloaded."""
        waiting = [job.tenant for job in self._jobs.values() if job.state == "queued"]
        if waiting.count(tenant) >= MAX_QUEUED_OF_TENANT:
            limit = f"{MAX_QUEUED_OF_TENANT} jobs of this tenant are waiting, which is the limit for one"
            raise Overloaded(f"{limit}. Try again later.")
        if len(waiting) >= MAX_QUEUED:
            raise Overloaded(f"{MAX_QUEUED} jobs are waiting, which is the limit. Try again later.")

    def _enqueue(self, job: Job) -> None:
        self._queue.append(job)
        self._filled.set()

    def _note(self, job: Job) -> None:
        fields = {name: getattr(job, name) for name in ("tenant", "kind", "order", "key", "created", "attempts")}
        self._place.notes.put(job.id, {**fields, "owner": self._place.owner})

    def _forget(self) -> None:
        finished = [job.id for job in self._jobs.values() if job.ended.is_set()]
        for job_id in finished[:-HISTORY]:
            del self._jobs[job_id]


def _failure(job: Job, error: Exception) -> CodedError:
    if isinstance(error, CodedError):
        return error
    if isinstance(error, OSError):
        return write_error(error, "folder of the jobs")
    log.error("job_failed", exc_info=error, extra={"job": job.id, "kind": job.kind})
    return JobCrashed("The job failed unexpectedly; the server's log says more.", code="internal_error")


def _cancelled() -> JobCancelled:
    return JobCancelled("The job was cancelled before it was finished. Nothing was stored.")
