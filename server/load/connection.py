"""HTTP/1.1 as far as a load needs it: one POST after the other over one connection, the answer's body as it comes.

Parsed in C, so that on one machine the cores are left to the server.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from urllib.parse import SplitResult

import httptools

READ_BYTES = 1 << 16


class Cut(ConnectionError):
    """The server closed the connection before the answer was whole."""


class Connection:
    """To one server; opened at the first request, and again when the server has closed it meanwhile."""

    def __init__(self, url: SplitResult, headers: Mapping[str, str]) -> None:
        self._url = url
        fields = {"Host": url.netloc.rpartition("@")[2], "Content-Type": "application/json", **headers}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._pieces: list[bytes] = []
        self._whole = False
        self.status = 0

    async def post(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        """The pieces of the answer's body; `status` is set before the first. Raises OSError, HttpParserError or Cut."""
        head = f"POST {self._url.path.rstrip('/')}{path} HTTP/1.1\r\n{self._fields}Content-Length: {len(body)}\r\n\r\n"
        kept = self._streams is not None
        self._pieces, self._whole, self.status = [], False, 0
        parser = httptools.HttpResponseParser(self)
        reader, data = await self._send(head.encode("latin-1") + body)
        if not data and kept:  # it was closed while nothing was sent
            self.close()
            reader, data = await self._send(head.encode("latin-1") + body)
        while data:
            parser.feed_data(data)
            self.status = parser.get_status_code()
            if self._pieces:
                yield b"".join(self._pieces)
                self._pieces.clear()
            if self._whole:
                break
            data = await reader.read(READ_BYTES)
        if not self._whole:
            self.close()
            raise Cut("the connection was closed before the answer was whole")
        if not parser.should_keep_alive():
            self.close()

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._whole = True

    async def _send(self, request: bytes) -> tuple[asyncio.StreamReader, bytes]:
        """The answer's first bytes; none if the server has closed the connection."""
        if self._streams is None:
            secure = ssl.create_default_context() if self._url.scheme == "https" else None
            port = self._url.port or (443 if secure else 80)
            self._streams = await asyncio.open_connection(self._url.hostname, port, ssl=secure)
        reader, writer = self._streams
        try:
            writer.write(request)
            await writer.drain()
            return reader, await reader.read(READ_BYTES)
        except ConnectionError:
            return reader, b""
