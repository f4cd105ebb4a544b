"""Work that ends when its client leaves."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.types import Receive

from server.api.errors import ClientGone

T = TypeVar("T")


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client is gone. Only after the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves first (then ClientGone)."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
    finally:
        await to_the_end(cancel_all(task, watcher))
    raise ClientGone("The client left before the answer was ready.")


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` to its end even while the caller is being cancelled, which anyio does again at every await."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()


async def cancel_all(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel and wait until all have run their `finally`."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
