"""The FastAPI application: routers, the error handler, and what surrounds each request."""

import asyncio

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.types import Lifespan

from adapters_store.errors import CodedError
from server.api.access import describe_keys, needs_of
from server.api.browser_guard import BrowserGuard
from server.api.context import RequestContext
from server.api.drain import DrainGate
from server.api.errors import coded, error_response
from server.api.routes import (
    adapter_upload,
    adapters,
    base_merge,
    chat,
    completions,
    compression,
    generators,
    jobs,
    lora_admin,
    merge,
    models,
    operations,
    replicas,
    tgi,
    tokens,
)
from server.api.services import Services

ROUTERS = (
    tgi.router,
    completions.router,
    chat.router,
    models.router,
    tokens.router,
    adapter_upload.router,
    adapters.router,
    compression.router,
    merge.router,
    base_merge.router,
    generators.router,
    jobs.router,
    lora_admin.router,
    operations.router,
    replicas.router,
)


def create_api(services: Services, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The HTTP side of the service, over an engine and a registry that are already there."""
    api = FastAPI(
        title="Polyrank",
        summary="One base model, thousands of adapters, one batch.",
        version=operations.server_version(),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    api.state.services = services
    api.state.upload_bodies = 0
    api.state.upload_slots = asyncio.Semaphore(services.settings.max_uploads)
    services.metrics.watch_engine(services.engine.info, services.engine.stats)
    services.metrics.watch_replicas(services.replicas)
    for router in ROUTERS:
        api.include_router(router)
    for context in iter_route_contexts(api.routes):
        if isinstance(context.original_route, APIRoute):
            needs_of(context.original_route)
    if services.keys is not None:
        describe_keys(api)
    for kind in (CodedError, RequestValidationError, HTTPException):
        api.add_exception_handler(kind, _answer_error)
    api.add_middleware(BrowserGuard, settings=services.settings)
    api.add_middleware(DrainGate, drain=services.drain)
    api.add_middleware(RequestContext, metrics=services.metrics, audit=services.audit, tracer=services.tracer)
    return api


async def _answer_error(request: Request, error: Exception) -> Response:
    """The one handler. What is not foreseen goes on to RequestContext, which logs it and says only that it happened."""
    extra = error.headers if isinstance(error, HTTPException) else None
    return error_response(request, coded(error), extra)
