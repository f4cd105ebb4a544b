"""Bodies of the adapter routes."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from adapters_store import info
from server.api.schemas.sampling import Strict
from server.api.services import Engine
from server.engine.status import Residency

MAX_VERSION = 2**31 - 1


class FromStore(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Notice(FromStore):
    code: str
    message: str


class RankRange(FromStore):
    min: int
    max: int


class ModuleCount(FromStore):
    matched: int
    total: int


class BaseName(FromStore):
    id: str
    fingerprint: str


class AdapterInfo(FromStore):
    """One version of an adapter. `residency` and `pinned` are this server's; the rest is the store's."""

    name: str
    version: int
    digest: str
    kind: str
    forms: list[str]
    rank: RankRange
    modules: ModuleCount
    parameters: int
    bytes: int
    base: BaseName
    created: str
    event: str
    provenance: dict[str, Any]
    compression: dict[str, Any] | None
    warnings: list[Notice]
    residency: Residency = Residency.ABSENT
    pinned: bool = False


class AdapterList(BaseModel):
    """One page, and where the next begins."""

    adapters: list[AdapterInfo]
    next: str | None


class VersionList(BaseModel):
    versions: list[AdapterInfo]


class RollbackRequest(Strict):
    version: Annotated[int, Field(ge=1, le=MAX_VERSION)]


class LoadAdapterRequest(Strict):
    """vLLM's body. `lora_path` is a folder below the server's adapter root, absolute or relative to it."""

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    pinned: bool = False


class UnloadAdapterRequest(Strict):
    lora_name: Annotated[str, Field(min_length=1, max_length=512)]


def adapter_body(engine: Engine, adapter: info.AdapterInfo) -> AdapterInfo:
    """What the store and the engine know, together."""
    body = AdapterInfo.model_validate(adapter)
    if adapter.digest:
        body.residency = engine.residency(adapter.digest)
        body.pinned = engine.pinned(adapter.digest)
    return body
