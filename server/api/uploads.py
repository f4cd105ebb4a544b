"""An upload from its first byte to its last; weights and files lie in a staged file that is always removed."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from adapters_store.errors import write_error
from adapters_store.staging import staged_file
from server.api.disconnect import to_the_end
from server.api.errors import BadUpload, ClientGone, UnsupportedMediaType, UploadIncomplete, UploadRefused
from server.api.multipart import PartReader
from server.api.services import ApiSettings
from server.errors import PayloadTooLarge

# Pieces from the socket are 64 KiB at most; a hop to a thread costs about 100 us, so several go together.
BATCH_BYTES = 1 << 20
_CHECKSUM = "weights_sha256"
_HEX = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True)
class Upload:
    """A complete, not yet judged adapter. `weights` lives until the context manager that gave it ends."""

    config: bytes
    weights: Path


class Sink(Protocol):
    """What a body is written to, in a worker thread."""

    def write(self, data: bytes, /) -> object: ...


@asynccontextmanager
async def receive_upload(request: Request, settings: ApiSettings) -> AsyncIterator[Upload]:
    """Read the body to disk. Whatever goes wrong, then or later, the staged file goes."""
    expected = expected_digest(request)
    boundary = _boundary(request)
    _check_declared(request, settings.max_upload_bytes)
    # In the loop, so that no cancellation can come between: one file.
    with staged_weights(settings) as weights:
        reader = PartReader(boundary, weights, settings.max_config_bytes)
        try:
            await _read(request, settings, reader)
            reader.finish()
        finally:
            reader.close()
        _check_digest(expected, reader.sha256.hexdigest())
        yield Upload(reader.config, weights)


@asynccontextmanager
async def receive_file(request: Request, settings: ApiSettings) -> AsyncIterator[Path]:
    """Read a body that is a file as it is to disk; it lives until the context ends."""
    kind = request.headers.get("content-type", "application/octet-stream").split(";")[0].strip().lower()
    if kind != "application/octet-stream":
        raise UnsupportedMediaType("Send the file as it is: `Content-Type: application/octet-stream`.")
    _check_declared(request, settings.max_upload_bytes)
    with staged_weights(settings) as path:
        file = path.open("wb")
        try:
            await _read(request, settings, file)
        finally:
            file.close()
        yield path


@contextmanager
def staged_weights(settings: ApiSettings) -> Iterator[Path]:
    """An empty file for weights. An OSError while it is in use is the disk's or the system's, not the client's."""
    try:
        with staged_file(settings.staging) as path:
            yield path
    except OSError as error:
        raise write_error(error, "staging folder") from error


async def _read(request: Request, settings: ApiSettings, reader: Sink) -> None:
    meter = _Meter(settings)
    batch = bytearray()
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(settings.upload_idle_seconds):
                piece = await anext(stream)
        except StopAsyncIteration:
            break
        except TimeoutError:
            text = f"No data came for {settings.upload_idle_seconds:g} seconds."
            raise UploadIncomplete(f"{text} Nothing was stored; send the upload again.") from None
        except ClientDisconnect:
            raise ClientGone("The client left in the middle of its upload.") from None
        meter.count(len(piece))
        batch += piece
        if len(batch) >= BATCH_BYTES:
            await _write(reader, bytes(batch))
            batch.clear()
    await _write(reader, bytes(batch))


async def _write(reader: Sink, data: bytes) -> None:
    await to_the_end(asyncio.to_thread(reader.write, data))  # the thread must be done before the file goes


class _Meter:
    """Counts bytes against the size limit and the least rate."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._clock = asyncio.get_running_loop().time
        self._started = self._clock()
        self._received = 0

    def count(self, size: int) -> None:
        self._received += size
        _check_size(self._received, self._settings.max_upload_bytes)
        late = self._clock() - self._started - self._settings.upload_idle_seconds
        if late > 0 and self._received < late * self._settings.min_upload_rate:
            text = f"The upload is slower than {self._settings.min_upload_rate} bytes per second."
            raise UploadIncomplete(text)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        text = f"The upload is larger than {limit} bytes. The server's --max-upload-bytes sets this limit."
        raise PayloadTooLarge(text)


def _check_declared(request: Request, limit: int) -> None:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal():
        _check_size(int(declared[:19]), limit)


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise UnsupportedMediaType("Send multipart/form-data with the parts `config` and `weights`.")
    boundary = options.get(b"boundary", b"")
    if not re.fullmatch(rb"[ -~]{1,70}", boundary):
        raise BadUpload("The multipart boundary must be 1 to 70 printable characters.")
    return boundary


def expected_digest(request: Request) -> str | None:
    """SHA-256 that the weights must have, from `?weights_sha256=`, in hex."""
    if "digest" in request.query_params:  # ignored, it would leave unchecked what the client wants checked
        text = "There is no parameter `digest`: an adapter's digest is made by the server. "
        raise BadUpload(f"{text}Send the SHA-256 of the weights file as `{_CHECKSUM}`.", param="digest")
    if (asked := request.query_params.get(_CHECKSUM)) is None:
        return None
    if not (match := _HEX.fullmatch(asked)):
        raise BadUpload(f"`{_CHECKSUM}` must be 64 hexadecimal digits, with or without `sha256:`.", param=_CHECKSUM)
    return match[1].lower()


def _check_digest(expected: str | None, actual: str) -> None:
    if expected is not None and expected != actual:
        text = f"The weights file has the SHA-256 {actual}, and `{_CHECKSUM}` says {expected}."
        raise UploadRefused(f"{text} Nothing was stored; send it again.", code="digest_mismatch", param=_CHECKSUM)
