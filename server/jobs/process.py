"""The process that does a job's work, seen from the server: started, listened to, killed."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from server.jobs.job import JobCrashed, WorkRefused

# One thread, for the cores are the engine's; no GPU, whose memory is the engine's too.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TOLD = "told.json"  # what the work returns, in its folder


async def run(module: str, folder: Path, order: Mapping[str, Any], progress: Callable[[float], None]) -> dict[str, Any]:
    """What `module.run(folder, order, progress)` returns in a fresh process of low priority; JSON both ways.

    Raises WorkRefused for a CodedError there, or JobCrashed. Cancelled, it kills the process and waits for its end; the
    process ends by itself when the server dies.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server.jobs.worker"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **ENVIRONMENT},
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):  # it ended at once, which its exit says
            process.stdin.write(json.dumps({"module": module, "folder": str(folder), "order": order}).encode() + b"\n")
            await process.stdin.drain()
        while line := await process.stdout.readline():
            said = json.loads(line)
            if "progress" in said:
                progress(said["progress"])
            elif "error" in said:
                raise WorkRefused(**said["error"])
            else:
                told: dict[str, Any] = json.loads(await asyncio.to_thread((folder / TOLD).read_bytes))
                return told
        raise _crashed(await process.wait())
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _crashed(code: int) -> JobCrashed:
    if code == -signal.SIGKILL:
        return JobCrashed("The process that did the work was killed; most likely the machine ran out of memory.")
    return JobCrashed(f"The process that did the work ended with {code}; the server's log says more.")
