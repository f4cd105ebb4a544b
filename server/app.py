"""The composition root: the only place where objects are built and wired."""

import asyncio
import logging
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from fastapi import FastAPI

from adapters_store.cache import CachePlace
from adapters_store.compression.recipe import in_memory
from adapters_store.errors import CodedError
from adapters_store.generators import Generators
from adapters_store.limits import Limits
from adapters_store.log import Log, open_store
from adapters_store.places import is_remote
from adapters_store.quota import no_quota
from adapters_store.registry import AdapterRegistry
from kernels import dispatch
from server import logs
from server.access.audit import AuditLog
from server.access.keeper import KeyKeeper, keeper_of
from server.api.application import create_api
from server.api.dependencies import Caller
from server.api.drain import Drain
from server.api.pins import release_replaced
from server.api.routes import generators, merge
from server.api.services import ApiSettings, Services
from server.compressor import Compressor
from server.engine.async_engine import AsyncEngine
from server.engine.build import build_engine
from server.engine.compute_threads import in_passing
from server.engine.limits import EngineLimits
from server.generator_trainer import GeneratorTrainer
from server.intake import Intake
from server.jobs.service import Jobs, Place
from server.loading import ending_at_once, leave
from server.loop_watch import LoopWatch
from server.merger import Merger
from server.metrics import Metrics
from server.model.errors import ModelLoadError
from server.model.loader import load_base_model
from server.model.quantize import check_quantization
from server.replicas.rate import Rate
from server.replicas.service import Place as Shared
from server.replicas.service import Replicas, placed
from server.replicas.state import Member
from server.replicas.teller import Notices
from server.serving import serve
from server.settings import Settings, is_loopback
from server.synthesizer import Synthesizer
from server.task_vectors import TaskVectors
from server.telemetry import open_tracer
from server.trials import Trials
from server.weight_finder import WeightFinder

TRACE_SECONDS = 1.0  # for the last traces, at the end

log = logging.getLogger(__name__)


def create_app(settings: Settings, drain: Drain) -> FastAPI:
    """Open the store, load the base model, build the engine and put the API before them.

    Takes seconds. Raises CodedError (ModelLoadError, StorageFull, StoreUnavailable) if one of them cannot be had: in
    plain words.
    """
    tracer = open_tracer(settings.otlp_endpoint)
    device = _device(settings)
    keys = keeper_of(settings.api_keys) if settings.api_keys is not None else None
    audit = AuditLog(settings.audit_log) if settings.audit_log is not None else None
    check_quantization(settings.quantize, device)
    store = open_store(settings.store, _cache(settings))  # first, for what may be wrong with it shows at once
    log.info("loading_model", extra={"model": settings.model, "device": device})
    base = load_base_model(settings.model, dtype=_dtype(settings, device), device=device)
    log.info("kernels", extra={"kind": dispatch.load(device)})
    notices = Notices()
    committed = notices.announce if settings.redis is not None else None
    spec = replace(base.spec, rounded=settings.quantize == "int8")
    quota_of = keys.quota if keys is not None else no_quota
    registry = AdapterRegistry(store, spec, _upload_limits(settings, base.dtype), committed, quota_of)
    if settings.preload is not None:
        preload(registry, settings.preload)
    served = partial(in_memory, dtype=settings.adapter_dtype, embeddings=base.spec.embeddings)
    trials = Trials(lambda digest: served(registry.load(digest)))
    engine = build_engine(base, _limits(settings), trials.load, settings.quantize, compiling=settings.compile)
    api_settings = ApiSettings(
        staging=store.staging,
        adapter_root=settings.adapter_root,
        merges_into_base=settings.merge_into_base,
        max_upload_bytes=int(settings.max_upload_bytes),
        loopback_only=is_loopback(settings.host),
    )
    intake = Intake(registry, engine, trials, served)
    compressor = Compressor(registry, engine, trials)
    replicas = _replicas(settings, registry, notices, engine)

    async def replaced(tenant: str, name: str, version: int) -> None:
        await release_replaced(services, Caller(tenant), name, version)

    metrics = Metrics()
    metrics.watch_store(registry.catalogue, engine.stats, engine.held)
    metrics.watch_uses(engine.take_uses)
    merger = Merger(registry, replaced, WeightFinder(engine))
    kept, vectors = Generators(store, spec, registry.limits, quota_of), TaskVectors(engine)
    trainer = GeneratorTrainer(registry, kept, vectors)
    synthesizer = Synthesizer(registry, kept, vectors, intake, replaced)
    ended = audit.job_ended if audit is not None else None
    jobs = Jobs({merge.KIND: merger, generators.KIND: trainer}, _jobs_place(settings, store), ended=ended)
    metrics.watch_jobs(jobs.counts)
    metrics.watch_access(keys.state if keys else None, (lambda: audit.failures) if audit else None)
    made = (engine, registry, intake, compressor, replicas, metrics, api_settings, drain)
    generating: dict[str, Any] = {"generators": kept, "trainer": trainer, "synthesizer": synthesizer}
    services = Services(*made, merger=merger, jobs=jobs, keys=keys, audit=audit, tracer=tracer, **generating)
    # A bucket would be read from end to end by every server that starts: there, files are verified as they are used.
    verified = None if is_remote(settings.store) else registry
    return create_api(services, lifespan=_lifespan(services, engine, replicas, jobs, keys, verified))


def run(settings: Settings) -> None:
    """Serve until told to stop; running requests get `drain_seconds` to finish."""
    logs.configure(settings.log_level, settings.log_format)
    transformers.utils.logging.disable_progress_bar()  # its bars would stand between the lines of the log
    drain = Drain()
    with ending_at_once():  # until uvicorn has its own handlers in place
        app = in_passing(lambda: create_app(settings, drain))
        serve(app, drain, settings.host, settings.port, settings.drain_seconds)
    leave()


def preload(registry: AdapterRegistry, folder: Path) -> None:
    """Register every PEFT folder below `folder` under its own name, unless that name has been used before.

    A deleted adapter thus stays deleted. One that cannot be served is logged and left out; the server starts without.
    """
    for config in sorted(folder.glob("*/adapter_config.json")):
        name = config.parent.name
        try:
            registry.versions(name)
        except CodedError:
            try:
                registry.add(name, config.read_bytes(), config.parent / "adapter_model.safetensors")
                log.info("adapter_preloaded", extra={"adapter": name})
            except (CodedError, OSError) as error:
                log.warning("adapter_not_preloaded", extra={"adapter": name, "reason": str(error)})


def _lifespan(
    services: Services,
    engine: AsyncEngine,
    replicas: Replicas,
    jobs: Jobs,
    keys: KeyKeeper | None,
    verified: AdapterRegistry | None,
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        stopping = threading.Event()
        watch = LoopWatch(services.metrics.loop_lag)
        watch.start()
        engine.start()
        replicas.start()
        if keys is not None:
            keys.start()
        await jobs.start()
        if verified is not None:
            threading.Thread(target=_verify, args=(verified, stopping), name="verify-store", daemon=True).start()
        try:
            yield
        finally:
            stopping.set()
            watch.stop()
            try:
                await jobs.stop()
                await asyncio.to_thread(replicas.stop)
                if keys is not None:
                    await asyncio.to_thread(keys.stop)
            finally:
                await engine.stop()
                if services.tracer is not None:
                    last = threading.Thread(target=services.tracer.close, name="last-traces", daemon=True)
                    last.start()
                    await asyncio.to_thread(last.join, TRACE_SECONDS)

    return lifespan


def _verify(registry: AdapterRegistry, stopping: threading.Event) -> None:
    """Hash what the store holds while requests are served: a damaged adapter is listed as such and answers 503."""
    for digest in sorted(registry.verify(stopping.is_set)):
        log.error("adapter_corrupt", extra={"digest": digest})


def _replicas(settings: Settings, registry: AdapterRegistry, notices: Notices, engine: AsyncEngine) -> Replicas:
    identity = uuid.uuid4().hex
    everywhere = settings.host in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
    address = f"http://{socket.gethostname()}:{settings.port}" if everywhere else settings.address

    def own() -> Member:
        stats = engine.stats()
        resident = placed(engine.held(), engine.residency)
        return Member(identity, address, engine.info.model_id, stats.running, stats.waiting, stats.kv_usage, resident)

    rate = Rate.parse(settings.rate_limit) if settings.rate_limit is not None else None
    return Replicas(Shared(settings.store, settings.redis, rate), registry.catalogue, registry.base.names, notices, own)


def _jobs_place(settings: Settings, store: Log) -> Place:
    """A server that comes back on the same host and port goes on with its jobs, whatever else shares the store."""
    room = store.staging.with_name(f"{store.staging.name}-jobs")
    return Place(store.notes, f"{socket.gethostname()}:{settings.port}", room)


def _device(settings: Settings) -> str:
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise ModelLoadError(
            "--device cuda: there is no usable GPU, or this torch was built without CUDA. Use --device cpu."
        )
    if settings.device == "auto":
        return "cuda" if available else "cpu"
    return settings.device


def _named(dtype: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype)
    return found


def _dtype(settings: Settings, device: str) -> torch.dtype:
    """float32 on a CPU: without AMX bf16 products are the slowest there (facts measured 2026-11-22)."""
    if settings.dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return _named(settings.dtype)


def _cache(settings: Settings) -> CachePlace | None:
    if settings.store_cache is None:
        return None
    return CachePlace(settings.store_cache, int(settings.store_cache_bytes))


def _upload_limits(settings: Settings, dtype: torch.dtype) -> Limits:
    """A model in float16 refuses what is finite in the file and infinite there."""
    return Limits(max_rank=settings.max_rank, cast=torch.float16 if dtype == torch.float16 else None)


def _limits(settings: Settings) -> EngineLimits:
    return EngineLimits(
        kv_cache_memory=int(settings.kv_cache_memory),
        kv_cache_dtype=None if settings.kv_cache_dtype == "auto" else _named(settings.kv_cache_dtype),
        adapter_memory=int(settings.adapter_memory),
        device_memory=int(settings.device_memory),
        host_adapter_memory=int(settings.host_adapter_memory),
        max_batch_tokens=settings.max_batch_tokens,
        max_running=settings.max_running,
        max_queued=settings.max_queued,
        max_context=settings.max_context,
        max_rank=settings.max_rank,
        stuck_seconds=settings.stuck_seconds,
    )
