"""`/health`, `/ready`, `/info`, `/metrics`: for orchestrators, routers and people."""

import asyncio
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict

from adapters_store.formats import table
from adapters_store.names import PUBLIC
from server.api.access import ANY_KEY, OPEN, WATCH
from server.api.dependencies import ServicesDep
from server.api.errors import Unhealthy
from server.api.schemas.errors import error_responses
from server.api.schemas.sampling import MAX_CHOICES, MAX_STOPS
from server.errors import NotReady

router = APIRouter(tags=["operations"])


class State(BaseModel):
    status: str


class RedisLink(BaseModel):
    """The link to Redis since the start; `openings`: how often it was given up for a second after a failure."""

    model_config = ConfigDict(from_attributes=True)

    up: bool
    calls: int
    failures: int
    openings: int


class Method(BaseModel):
    """A method of adapting. `status`: `native` (in a form of its own), `folded` (as a low-rank delta) or `declined`;
    `note`: how, or why not; `source`: paper or code."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    status: str
    note: str
    source: str


class ServerInfo(BaseModel):
    """TGI's fields first (its clients read them), then ours."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    model_sha: str
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_input_length: int
    max_total_tokens: int
    max_batch_total_tokens: int
    max_client_batch_size: int
    validation_workers: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    architecture: str
    fingerprint: str
    quantization: str
    vocabulary: int
    block_size: int
    kv_blocks: int
    device_memory_bytes: int
    adapter_memory_bytes: int
    host_adapter_memory_bytes: int
    adapters_resident: int
    max_upload_bytes: int
    redis: RedisLink | None
    replicas: int
    methods: list[Method]


# `include_in_schema`: HEAD is GET without the body, and a second operation of the same name would confuse generators.
@router.head("/health", include_in_schema=False, dependencies=[OPEN])
@router.get("/health", responses=error_responses(503), dependencies=[OPEN])
async def health(services: ServicesDep) -> State:
    """Alive: the engine steps. A failing answer means restart."""
    if not services.engine.healthy():
        raise Unhealthy("The engine has stopped or makes no steps. Restart the server.")
    return State(status="ok")


@router.head("/ready", include_in_schema=False, dependencies=[OPEN])
@router.get("/ready", responses=error_responses(503), dependencies=[OPEN])
async def ready(services: ServicesDep) -> State:
    """Takes work: model loaded, store readable, not draining. A failing answer means send requests elsewhere."""
    if services.drain.active or not services.engine.ready():
        raise NotReady("The server is starting, draining or stuck. Send requests elsewhere for now.")
    try:
        await asyncio.to_thread(services.adapters.list, PUBLIC, None, 1)
    except Exception as error:
        raise NotReady("The adapter store cannot be read.", code="store_unavailable") from error
    return State(status="ready")


@router.get("/info", responses=error_responses(401, 503), dependencies=[ANY_KEY])
async def server_info(services: ServicesDep) -> ServerInfo:
    """The base model, how it runs, and the limits of requests."""
    info, link = services.engine.info, services.replicas.link()
    return ServerInfo(
        model_id=info.model_id,
        model_sha=info.fingerprint,
        model_dtype=info.dtype,
        model_device_type=info.device,
        model_pipeline_tag="text-generation",
        max_concurrent_requests=info.max_running + info.max_queued,
        max_best_of=MAX_CHOICES,
        max_stop_sequences=MAX_STOPS,
        max_input_tokens=info.max_context - 1,
        max_input_length=info.max_context - 1,
        max_total_tokens=info.max_context,
        max_batch_total_tokens=info.kv_blocks * info.block_size,
        max_client_batch_size=1,
        validation_workers=1,
        router="polyrank",
        version=server_version(),
        sha=None,
        docker_label=None,
        architecture=info.architecture,
        fingerprint=info.fingerprint,
        quantization=info.quantization,
        vocabulary=info.vocabulary,
        block_size=info.block_size,
        kv_blocks=info.kv_blocks,
        device_memory_bytes=info.device_memory_bytes,
        adapter_memory_bytes=info.adapter_memory_bytes,
        host_adapter_memory_bytes=info.host_adapter_memory_bytes,
        adapters_resident=services.engine.stats().adapters_resident,
        max_upload_bytes=services.settings.max_upload_bytes,
        redis=RedisLink.model_validate(link) if link.configured else None,
        replicas=services.replicas.count(),
        methods=[Method.model_validate(known) for known in table.known()],
    )


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **error_responses(401, 403, 503)},
    dependencies=[WATCH],
)
async def metrics(services: ServicesDep) -> Response:
    """Prometheus."""
    text = await asyncio.to_thread(services.metrics.render)
    return Response(text, media_type=services.metrics.content_type)


def server_version() -> str:
    try:
        return version("polyrank")
    except PackageNotFoundError:  # run from a bare checkout
        return "0"
