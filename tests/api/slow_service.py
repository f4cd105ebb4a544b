"""`python -m tests.api.slow_service PORT DRAIN_SECONDS`: the API over the fake engine, as a process to be stopped.

An answer's first token comes at once, its second and last when a line comes on stdin.
"""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from server import logs
from server.api.application import create_api
from server.api.services import ApiSettings, Services
from server.engine.request import FinishReason, GenerationRequest, StepOutput
from server.metrics import Metrics
from server.serving import serve
from tests.api.fake_compressor import FakeCompressor
from tests.api.fake_engine import FIRST_BYTE, FakeEngine
from tests.api.fake_generation import fake_generation
from tests.api.fake_intake import FakeIntake
from tests.api.fake_merger import FakeMerger, fake_jobs
from tests.api.fake_registry import FakeRegistry
from tests.api.fake_replicas import FakeReplicas


def main(port: int, drain_seconds: float) -> None:
    engine, told = FakeEngine(), asyncio.Event()

    async def until_told(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        yield StepOutput(FIRST_BYTE + 97, "a", prompt=engine.prompt_output(request))
        asyncio.get_running_loop().add_reader(sys.stdin, told.set)
        await told.wait()
        yield StepOutput(FIRST_BYTE + 98, "b", finish_reason=FinishReason.LENGTH)

    engine.script = until_told
    logs.configure("info", "text")
    with tempfile.TemporaryDirectory() as staging:
        registry = FakeRegistry()
        settings = ApiSettings(staging=Path(staging))
        made = (FakeIntake(registry), FakeCompressor(registry), FakeReplicas())
        merger = FakeMerger(registry)
        jobs = fake_jobs(merger, Path(staging))
        generation = fake_generation(registry, Path(staging))
        services = Services(engine, registry, *made, Metrics(), settings, merger=merger, jobs=jobs, **generation)
        serve(create_api(services), services.drain, "127.0.0.1", port, drain_seconds)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
