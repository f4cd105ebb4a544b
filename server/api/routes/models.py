"""`GET /v1/models`: the base model and every adapter."""

import asyncio
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path

from adapters_store.info import AdapterInfo
from server.api.access import LIST
from server.api.adapter_choice import is_base, resolve
from server.api.dependencies import CallerDep, ServicesDep
from server.api.schemas.errors import READ_ERRORS
from server.api.schemas.models import ModelCard, ModelList
from server.api.services import Services

router = APIRouter(tags=["models"], dependencies=[LIST])

PAGE = 1000


@router.get("/v1/models", responses=READ_ERRORS)
async def list_models(services: ServicesDep, caller: CallerDep) -> ModelList:
    """Not paged: no client asks for a second page."""
    adapters = await asyncio.to_thread(_all, services, caller.tenant)
    return ModelList(data=[_base(services), *(_card(services, adapter) for adapter in adapters)])


@router.get("/v1/models/{model_id:path}", responses=READ_ERRORS)
async def get_model(
    model_id: Annotated[str, Path(max_length=512)], services: ServicesDep, caller: CallerDep
) -> ModelCard:
    """One of them by its id, which for the base model may contain a slash."""
    if is_base(services, model_id):
        return _base(services)
    ref = await resolve(services, caller, model_id)
    adapter = await asyncio.to_thread(services.adapters.info, model_id, caller.tenant)
    return _card(services, adapter, name=ref.name if ref.name == model_id else model_id)


def _all(services: Services, tenant: str) -> list[AdapterInfo]:
    found: list[AdapterInfo] = []
    cursor: str | None = None
    while True:
        page, cursor = services.adapters.list(tenant, cursor, PAGE)
        found += page
        if cursor is None:
            return found


def _base(services: Services) -> ModelCard:
    info = services.engine.info
    root = f"base://{info.model_id}@{info.fingerprint}"
    return ModelCard(id=info.model_id, created=services.started, root=root, parent=None, max_model_len=info.max_context)


def _card(services: Services, adapter: AdapterInfo, name: str | None = None) -> ModelCard:
    return ModelCard(
        id=name or adapter.name,
        created=_unix(adapter.created),
        root=f"adapter://{adapter.name}@sha256:{adapter.digest}",
        parent=services.engine.info.model_id,
        max_model_len=services.engine.info.max_context,
    )


def _unix(created: str) -> int:
    try:
        return int(datetime.fromisoformat(created).timestamp())
    except ValueError:  # a damaged record has no date
        return 0
