"""Answers that are a file of the store, read off the event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from fastapi.responses import StreamingResponse


def file_answer(size: int, pieces: Iterator[bytes], filename: str) -> StreamingResponse:
    """size: in bytes; pieces: is closed whatever happens."""
    media_type = "application/json" if filename.endswith(".json") else "application/octet-stream"
    headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{filename}"'}
    return StreamingResponse(_off_loop(pieces), media_type=media_type, headers=headers)


async def _off_loop(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    try:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
    finally:
        close = getattr(pieces, "close", None)
        with contextlib.suppress(ValueError):  # still running in its thread: it ends with the last reference
            if close:
                close()
