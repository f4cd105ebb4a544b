"""`GET /replicas`: the servers over this store, for operators and routers."""

import asyncio

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from server.api.access import WATCH
from server.api.dependencies import ServicesDep
from server.api.schemas.errors import READ_ERRORS

router = APIRouter(tags=["operations"], dependencies=[WATCH])


class Replica(BaseModel):
    """`resident`: digests by where they are (`resident`, `loading`, ...), at most 1000 each; `age`: seconds since this
    server heard of it, 0 for this server itself."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    address: str
    model: str
    running: int
    waiting: int
    kv_usage: float
    resident: dict[str, list[str]]
    age: float


class ReplicaList(BaseModel):
    """This server comes first; the others are known through Redis only, and forgotten 5 seconds after their last
    word."""

    redis_up: bool
    replicas: list[Replica]


@router.get("/replicas", responses=READ_ERRORS)
async def list_replicas(services: ServicesDep) -> ReplicaList:
    """Load and adapters of each server, as it told last. Answered from memory: no server is asked."""
    members = await asyncio.to_thread(services.replicas.members)  # this server looks where each of its adapters is
    told = [Replica.model_validate(member) for member in members]
    return ReplicaList(redis_up=services.replicas.link().up, replicas=told)
