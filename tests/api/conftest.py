"""An API over a fake engine and a fake registry, and a client for it."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.application import create_api
from server.api.services import ApiSettings, Services
from server.jobs.service import Jobs
from server.metrics import Metrics
from tests.api.fake_compressor import FakeCompressor
from tests.api.fake_engine import FakeEngine
from tests.api.fake_generation import fake_generation
from tests.api.fake_intake import FakeIntake
from tests.api.fake_merger import FakeMerger, fake_jobs
from tests.api.fake_registry import FakeRegistry
from tests.api.fake_replicas import FakeReplicas


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def registry() -> FakeRegistry:
    registry = FakeRegistry()
    registry.put("legal")
    registry.put("poet")
    return registry


@pytest.fixture
def adapter_root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    root.mkdir()
    return root


@pytest.fixture
def settings(tmp_path: Path, adapter_root: Path) -> ApiSettings:
    staging = tmp_path / "staging"
    staging.mkdir()
    return ApiSettings(staging=staging, adapter_root=adapter_root, max_upload_bytes=4 << 20, max_json_bytes=1 << 20)


@pytest.fixture
def compressor(registry: FakeRegistry) -> FakeCompressor:
    return FakeCompressor(registry)


@pytest.fixture
def merger(registry: FakeRegistry) -> FakeMerger:
    return FakeMerger(registry)


@pytest.fixture
def generation(registry: FakeRegistry, tmp_path: Path) -> dict[str, Any]:
    """Generators, trainer and synthesizer."""
    return fake_generation(registry, tmp_path)


@pytest.fixture
async def jobs(merger: FakeMerger, tmp_path: Path, generation: dict[str, Any]) -> AsyncIterator[Jobs]:
    jobs = fake_jobs(merger, tmp_path, generation["trainer"])
    await jobs.start()
    yield jobs
    await jobs.stop()


@pytest.fixture
def replicas() -> FakeReplicas:
    return FakeReplicas()


@pytest.fixture
def services(
    engine: FakeEngine,
    registry: FakeRegistry,
    compressor: FakeCompressor,
    replicas: FakeReplicas,
    settings: ApiSettings,
    merger: FakeMerger,
    jobs: Jobs,
    generation: dict[str, Any],
) -> Services:
    made = (engine, registry, FakeIntake(registry), compressor, replicas, Metrics(), settings)
    return Services(*made, merger=merger, jobs=jobs, **generation)


@pytest.fixture
def api(services: Services) -> FastAPI:
    return create_api(services)


@pytest.fixture
async def client(api: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://polyrank") as client:
        yield client
