"""The queue: states, order, cancelling, errors, history, and what a restart finds."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from adapters_store.bucket import Bucket
from adapters_store.errors import AdapterConflict, AdapterInvalid, CodedError, StoreUnavailable
from adapters_store.notes import Notes
from adapters_store.objects import Objects
from server.errors import NotReady, Overloaded
from server.jobs import fair_queue, service
from server.jobs.job import Job, JobNotFound
from server.jobs.service import Jobs, Place
from tests.jobs.support import PATIENCE, FakeKind, FakeWork, place, submit


@asynccontextmanager
async def running(kind: FakeKind, work: FakeWork, at: Place) -> AsyncIterator[Jobs]:
    jobs = Jobs({"fake": kind}, at, work)
    async with asyncio.timeout(PATIENCE):
        await jobs.start()
        try:
            yield jobs
        finally:
            await jobs.stop()


async def test_a_job_from_queue_to_result(tmp_path: Path) -> None:
    kind, work, at = FakeKind(), FakeWork(held=True), place(tmp_path)
    async with running(kind, work, at) as jobs:
        job = await submit(jobs, 7)
        assert job.state == "queued"
        assert jobs.counts() == {(job.kind, "queued"): 1}
        assert list(at.notes.all()) == [job.id]
        await work.begun.wait()
        assert job.state == "running"
        assert 0.4 < job.progress < 0.6
        assert kind.folders[0].is_dir()
        work.go.set()
        await job.ended.wait()
        assert (job.state, job.progress, job.result, job.error) == ("done", 1.0, {"given": "7", "x": 7}, None)
        assert job.finished >= job.created
        assert jobs.counts() == {(job.kind, "done"): 1}
        assert jobs.get("public", job.id) is job
        assert at.notes.all() == {}
    assert not kind.folders[0].exists()


async def test_what_preparing_takes_of_the_progress_the_work_has_not(tmp_path: Path) -> None:
    kind, work = FakeKind(), FakeWork(held=True)
    kind.prepared = 0.9
    async with running(kind, work, place(tmp_path)) as jobs:
        job = await submit(jobs, 1)
        await work.begun.wait()
        assert 0.9 < job.progress < 0.95  # the work has told that half of it is done


async def test_one_at_a_time_in_order(tmp_path: Path) -> None:
    kind, work = FakeKind(), FakeWork()
    async with running(kind, work, place(tmp_path)) as jobs:
        made = [await submit(jobs, x) for x in range(6)]
        for job in made:
            await job.ended.wait()
        assert [x for _, x in kind.done] == list(range(6))
        assert work.most == 1
        assert jobs.list("public") == made[::-1]


async def test_tenants_take_turns_and_each_is_served_in_order(tmp_path: Path) -> None:
    kind, work = FakeKind(), FakeWork(held=True)
    async with running(kind, work, place(tmp_path)) as jobs:
        made = [await submit(jobs, 0, "a")]
        await work.begun.wait()
        for tenant, count in (("a", 4), ("b", 2), ("c", 3)):
            made += [await submit(jobs, x, tenant) for x in range(1, count + 1)]
        await jobs.cancel("c", made[-2].id)
        work.go.set()
        for job in made:
            await job.ended.wait()
        order = "a0 b1 c1 a1 b2 c3 a2 a3 a4"
        assert " ".join(f"{tenant}{x}" for tenant, x in kind.done) == order


async def test_the_turn_is_of_the_tenant_whose_job_began_longest_ago(tmp_path: Path) -> None:
    kind, work = FakeKind(), FakeWork()
    async with running(kind, work, place(tmp_path)) as jobs:
        for tenant in ("a", "b", "c"):
            await (await submit(jobs, 0, tenant)).ended.wait()
        work.go.clear()
        work.begun.clear()
        made = [await submit(jobs, 1, "d")]
        await work.begun.wait()
        made += [await submit(jobs, 1, tenant) for tenant in ("c", "a", "b", "e")]
        work.go.set()
        for job in made:
            await job.ended.wait()
        assert [tenant for tenant, _ in kind.done[3:]] == ["d", "e", "a", "b", "c"], "its line was empty meanwhile"


def test_of_many_tenants_the_turns_of_the_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "REMEMBERED", 2)
    queue = fair_queue.FairQueue()
    for tenant in "abcd":
        queue.append(Job(tenant, "fake", {}, ""))
        assert queue.pop().tenant == tenant
    for tenant in "dba":
        queue.append(Job(tenant, "fake", {}, ""))
    assert [queue.pop().tenant for _ in range(3)] == ["b", "a", "d"], "a and b are as new ones"
    assert not queue


async def test_equal_work_is_done_once_while_it_is_unfinished(tmp_path: Path) -> None:
    work = FakeWork(held=True)
    async with running(FakeKind(), work, place(tmp_path)) as jobs:
        one = await submit(jobs, 1)
        assert await submit(jobs, 1) is one
        assert await submit(jobs, 1, tenant="other") is not one
        assert await submit(jobs, 2) is not one
        work.go.set()
        await one.ended.wait()
        assert await submit(jobs, 1) is not one


async def test_another_tenants_jobs_are_not_there(tmp_path: Path) -> None:
    work = FakeWork(held=True)
    async with running(FakeKind(), work, place(tmp_path)) as jobs:
        job = await submit(jobs, 1)
        for tenant, job_id in (("other", job.id), ("public", "nobody")):
            with pytest.raises(JobNotFound):
                jobs.get(tenant, job_id)
        with pytest.raises(JobNotFound):
            await jobs.cancel("other", job.id)
        assert jobs.list("other") == []
        assert job.state != "cancelled"


async def test_cancelling(tmp_path: Path) -> None:
    kind, work, at = FakeKind(), FakeWork(held=True), place(tmp_path)
    async with running(kind, work, at) as jobs:
        first, second, third = [await submit(jobs, x) for x in range(3)]
        await work.begun.wait()
        for job in (second, first):  # one that waits, one at work
            assert await jobs.cancel("public", job.id) is job
            assert job.error is not None
            assert (job.state, job.error.code, job.result) == ("cancelled", "job_cancelled", None)
        work.go.set()
        await third.ended.wait()
        assert kind.done == [("public", 2)]
        assert (await jobs.cancel("public", third.id)).state == "done"
        assert at.notes.all() == {}
        assert not any(folder.exists() for folder in kind.folders)


async def test_cancelled_before_its_first_step_it_ends(tmp_path: Path) -> None:
    at = place(tmp_path)
    async with running(FakeKind(), FakeWork(held=True), at) as jobs:
        for turns in range(6):  # how far the queue has come when the cancelling begins
            job = await submit(jobs, turns)
            for _ in range(turns):
                await asyncio.sleep(0)
            ended = await asyncio.gather(*(asyncio.wait_for(jobs.cancel("public", job.id), 30) for _ in range(2)))
            assert [each.state for each in ended] == ["cancelled", "cancelled"]
        assert at.notes.all() == {}


async def test_cancelled_while_it_is_noted_it_ends(tmp_path: Path) -> None:
    kind, at = FakeKind(), place(tmp_path)
    async with running(kind, FakeWork(), at) as jobs:
        submitting = asyncio.create_task(submit(jobs, 1))
        await asyncio.sleep(0)  # as far as the note, which another thread writes
        job = await asyncio.wait_for(jobs.cancel("public", jobs.list("public")[0].id), 30)
        assert await submitting is job
        assert (job.state, kind.done, at.notes.all()) == ("cancelled", [], {})


async def test_what_is_being_cancelled_is_not_given_to_others(tmp_path: Path) -> None:
    work = FakeWork(held=True)
    async with running(FakeKind(), work, place(tmp_path)) as jobs:
        first = await submit(jobs, 1)
        await work.begun.wait()
        cancelling = asyncio.create_task(jobs.cancel("public", first.id))
        await asyncio.sleep(0)
        second = await submit(jobs, 1)
        assert second is not first
        work.go.set()
        await asyncio.wait_for(second.ended.wait(), 30)
        assert ((await cancelling).state, second.state) == ("cancelled", "done")


async def test_what_is_being_stored_is_not_cancelled(tmp_path: Path) -> None:
    kind = FakeKind()
    kind.may_finish.clear()
    async with running(kind, FakeWork(), place(tmp_path)) as jobs:
        job = await submit(jobs)
        await kind.finishing.wait()
        cancelling = asyncio.create_task(jobs.cancel("public", job.id))
        await asyncio.sleep(0)
        assert not cancelling.done()
        kind.may_finish.set()
        assert (await cancelling).state == "done"


@pytest.mark.parametrize(
    ("step", "error", "code"),
    [
        ("prepare", AdapterInvalid("No.", code="feature_unsupported"), "feature_unsupported"),
        ("prepare", OSError(28, "No space left on device"), "storage_full"),
        ("work", AdapterInvalid("No.", code="rank_limit"), "rank_limit"),
        ("finish", AdapterConflict("Changed."), "adapter_exists"),
        ("finish", ValueError("secret detail"), "internal_error"),
    ],
)
async def test_failures(tmp_path: Path, step: str, error: Exception, code: str) -> None:
    kind, work = FakeKind(), FakeWork()
    kind.failure[step] = error
    work.crash = error if step == "work" else None
    async with running(kind, work, place(tmp_path)) as jobs:
        job = await submit(jobs)
        await job.ended.wait()
        assert (job.state, job.error.code, job.result) == ("failed", code, None)
        assert "secret" not in job.error.message
        kind.failure, work.crash = {}, None
        again = await submit(jobs)  # the queue goes on
        await again.ended.wait()
        assert again.state == "done"
        assert not any(folder.exists() for folder in kind.folders)


async def test_a_full_queue_and_a_stopped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_QUEUED", 2)
    work, at = FakeWork(held=True), place(tmp_path)
    async with running(FakeKind(), work, at) as jobs:
        first = await submit(jobs, 0)
        await work.begun.wait()
        for x in (1, 2):
            await submit(jobs, x)
        with pytest.raises(Overloaded):
            await submit(jobs, 3)
        assert await submit(jobs, 0) is first
        assert len(at.notes.all()) == 3
    with pytest.raises(NotReady):
        await submit(jobs, 4)


async def test_one_tenant_cannot_fill_the_queue(tmp_path: Path) -> None:
    most, work = service.MAX_QUEUED_OF_TENANT, FakeWork(held=True)
    assert 2 * most <= service.MAX_QUEUED
    async with running(FakeKind(), work, place(tmp_path)) as jobs:
        await submit(jobs, "first", "a")
        await work.begun.wait()
        tried = await asyncio.gather(*(submit(jobs, x, "a") for x in range(63)), return_exceptions=True)
        refused = [each for each in tried if isinstance(each, Overloaded)]
        assert len(refused) == 63 - most, "those count that are being noted"
        assert f"{most} jobs of this tenant" in refused[0].message
        for tenant in ("b", "c", "d"):
            for x in range(most):
                await submit(jobs, x, tenant)
        with pytest.raises(Overloaded) as caught:
            await submit(jobs, 0, "e")
        assert f"{service.MAX_QUEUED} jobs are waiting" in caught.value.message
        await jobs.cancel("a", tried[0].id)  # type: ignore[union-attr]
        await submit(jobs, 0, "e")


async def test_only_the_last_finished_jobs_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "HISTORY", 3)
    async with running(FakeKind(), FakeWork(), place(tmp_path)) as jobs:
        made = [await submit(jobs, x) for x in range(5)]
        for job in made:
            await job.ended.wait()
        found = jobs.add_done("public", "fake", {}, "k", {"there": True})
        assert (found.state, found.result, found.ended.is_set()) == ("done", {"there": True}, True)
        assert jobs.list("public") == [found, made[4], made[3]]


async def test_a_restart_goes_on_in_order(tmp_path: Path) -> None:
    objects = Objects(Bucket(MemoryStore()), shared=False, staging=tmp_path / "staging")
    kind, work, at = FakeKind(), FakeWork(held=True), place(tmp_path, objects)
    async with running(kind, work, at) as jobs:
        made = [await submit(jobs, x) for x in range(3)]
        await work.begun.wait()
    assert kind.done == []
    assert set(at.notes.all()) == {job.id for job in made}
    assert not any(folder.exists() for folder in kind.folders)
    async with running(kind, FakeWork(), place(tmp_path, objects, "elsewhere:1")) as other:
        job = await submit(other, 9)
        await job.ended.wait()
        assert kind.done == [("public", 9)], "another server's jobs are its own"
    async with running(kind, FakeWork(), at) as jobs:
        found = [jobs.get("public", job.id) for job in made]
        last = await submit(jobs, 4)
        await last.ended.wait()
        assert [x for _, x in kind.done[1:]] == [0, 1, 2, 4]
        assert [job.state for job in found] == ["done"] * 3
        assert at.notes.all() == {}


async def test_a_restart_keeps_each_tenants_order(tmp_path: Path) -> None:
    kind, work, at = FakeKind(), FakeWork(held=True), place(tmp_path)
    async with running(kind, work, at) as jobs:
        for tenant, x in (("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("c", 0)):
            await submit(jobs, x, tenant)
        await work.begun.wait()
    async with running(kind, FakeWork(), at) as jobs:
        for job in [job for tenant in "abc" for job in jobs.list(tenant)]:
            await job.ended.wait()
    assert kind.done == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2)]


async def test_a_job_that_the_server_dies_of_is_given_up(tmp_path: Path) -> None:
    kind, at, job_id = FakeKind(), place(tmp_path), ""
    for _ in range(service.MAX_ATTEMPTS):
        work = FakeWork(held=True)
        async with running(kind, work, at) as jobs:
            if not at.notes.all():
                job_id = (await submit(jobs)).id
            await work.begun.wait()
    async with running(kind, FakeWork(), at) as jobs:
        job = jobs.get("public", job_id)
        last = await submit(jobs, "last")
        await last.ended.wait()
        assert (job.state, job.error and job.error.code) == ("failed", "job_interrupted")
        assert at.notes.all() == {}
    assert kind.done == [("public", "last")]


class Broken(Notes):
    """A store that cannot be written."""

    def put(self, note: str, fields: dict[str, object]) -> None:
        raise StoreUnavailable("Away.")


async def test_a_job_that_cannot_be_noted_is_not_taken(tmp_path: Path) -> None:
    at = place(tmp_path)
    async with running(FakeKind(), FakeWork(), Place(Broken(Objects(Bucket(MemoryStore()))), "o", at.room)) as jobs:
        with pytest.raises(CodedError) as caught:
            await submit(jobs)
        assert caught.value.code == "store_unavailable"
        assert [job.state for job in jobs.list("public")] == ["failed"]
