"""A pin belongs to the version that was pinned and ends with it, else nobody would see what fills the memory."""

import asyncio
import contextlib
from collections.abc import Iterable

from server.api.dependencies import Caller
from server.api.services import Services
from server.errors import NotReady


async def release_deleted(services: Services, caller: Caller, name: str) -> None:
    """After a deletion: release what was pinned under the name."""
    versions = await asyncio.to_thread(services.adapters.versions, name, caller.tenant)
    await _release(services, {version.digest for version in versions})


async def release_replaced(services: Services, caller: Caller, name: str, version: int) -> None:
    """After `version` has become current: release the one before; an older one was pinned by its number."""
    versions = await asyncio.to_thread(services.adapters.versions, name, caller.tenant)
    await _release(services, {before.digest for before in versions if before.version == version - 1})


async def _release(services: Services, digests: Iterable[str]) -> None:
    """Unpin each unless it is still the content of a name, of whichever tenant."""
    for digest in digests:
        if digest and services.engine.pinned(digest) and not await asyncio.to_thread(services.adapters.held, digest):
            with contextlib.suppress(NotReady):  # the engine stops, and its pins end with it
                await services.engine.unpin(digest)
