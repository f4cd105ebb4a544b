"""One spelling for JSON, so that equal content has an equal digest."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def dump(value: Any) -> bytes:
    """JSON with sorted keys, no spaces and ASCII only; NaN and infinities raise ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def chunks(source: Path | bytes) -> Iterator[bytes]:
    """The bytes of a file or buffer, at most 1 MiB at a time."""
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while block := file.read(CHUNK):
            yield block


def digest_file(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in blocks."""
    sha = hashlib.sha256()
    for block in chunks(path):
        sha.update(block)
    return sha.hexdigest()


def shorten(text: str, limit: int = 120) -> str:
    """Foreign text for a message: control characters escaped, cut at `limit`."""
    shown = text[:limit].encode("unicode_escape").decode("ascii")
    return shown if len(text) <= limit else shown + "..."
