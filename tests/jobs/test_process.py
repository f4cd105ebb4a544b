"""The real process of the work: what it is told and tells, and that it is gone when it should be."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from adapters_store.errors import CodedError
from server.jobs import folders, process
from tests.contract.sources import ROOT
from tests.jobs.support import PATIENCE

MODULE = "tests.jobs.work"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


async def run(folder: Path, x: str) -> dict[str, object]:
    (folder / "given").write_text("here")
    told: list[float] = []
    async with asyncio.timeout(PATIENCE):
        result = await process.run(MODULE, folder, {"x": x}, told.append)
    assert told == [0.25]
    return result


async def test_it_works_with_low_priority_on_one_thread(tmp_path: Path) -> None:
    found = await run(tmp_path, "work")
    assert found == {"given": "here", "nice": 19, "threads": "1", "gpus": ""}


@pytest.mark.parametrize(
    ("x", "status", "code"), [("refuse", 422, "rank_limit"), ("raise", 500, "job_crashed"), ("die", 500, "job_crashed")]
)
async def test_how_it_may_fail(tmp_path: Path, x: str, status: int, code: str) -> None:
    with pytest.raises(CodedError) as caught:
        await run(tmp_path, x)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert "unforeseen" not in caught.value.message
    assert ("memory" in caught.value.message) == (x == "die")
    assert caught.value.param == ("rank" if x == "refuse" else None)


async def test_cancelled_it_is_killed(tmp_path: Path) -> None:
    (tmp_path / "given").touch()
    begun = asyncio.Event()
    task = asyncio.create_task(process.run(MODULE, tmp_path, {"x": "hang"}, lambda _: begun.set()))
    async with asyncio.timeout(PATIENCE):
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


SERVER = """
import asyncio, sys
from pathlib import Path
from server.jobs import process
asyncio.run(process.run("tests.jobs.work", Path(sys.argv[1]), {"x": "hang"}, lambda _: print("begun", flush=True)))
"""


def test_it_ends_with_the_server(tmp_path: Path) -> None:
    (tmp_path / "given").touch()
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"begun\n"
        (worker,) = psutil.Process(server.pid).children()
        os.kill(server.pid, signal.SIGKILL)
        worker.wait(PATIENCE)
        assert not worker.is_running()
    finally:
        server.kill()
        server.wait()


def test_folders_of_the_dead_are_swept(tmp_path: Path) -> None:
    room = tmp_path / "room"
    with folders.job_folder(room) as own:
        (own / "file").touch()
        dead = room / "dead"
        dead.mkdir()
        (dead / "lock").touch()
        (room / "stray").touch()
        folders.sweep(room)
        assert own.is_dir()
        assert not dead.exists()
    assert not own.exists()
