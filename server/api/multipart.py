"""The two parts of an adapter upload, taken from a multipart body as it arrives. Runs in a worker thread."""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.api.errors import BadUpload, UploadRefused

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_PART_HEADERS = 16
MAX_HEADER_BYTES = 4096
PARTS = ("config", "weights")
# Code or text that would be run or rendered if it were used: never looked at (CVE-2026-5760, -22807, -4372).
_FORBIDDEN = re.compile(
    r"chat_template|tokenizer|special_tokens|generation_config|auto_map|\.py$|\.jinja$", re.IGNORECASE
)


class PartReader:
    """Writes `weights` to a file and keeps `config` in memory; anything else is refused where it begins.

    weights: a file of the caller, empty until the part begins.
    """

    def __init__(self, boundary: bytes, weights: Path, max_config_bytes: int) -> None:
        self.config = b""
        self.sha256 = hashlib.sha256()
        self._path = weights
        self._file: BinaryIO | None = None
        self._max_config = max_config_bytes
        self._seen: set[str] = set()
        self._part: str | None = None
        self._header = (b"", b"")
        self._disposition = b""
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary, self._callbacks(), max_header_count=MAX_PART_HEADERS, max_header_size=MAX_HEADER_BYTES
            )
        except FormParserError as error:
            raise BadUpload(f"The multipart boundary cannot be used: {error}") from None

    def _callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def write(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise BadUpload(f"The multipart body is malformed: {error}") from None

    def finish(self) -> None:
        """After the last byte: everything must have been there."""
        if not self._ended:
            raise BadUpload("The multipart body ends in the middle of a part.")
        if missing := [part for part in PARTS if part not in self._seen]:
            raise BadUpload(f"The upload has no part {_quoted(missing)}; both `config` and `weights` are needed.")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _begin(self) -> None:
        self._disposition = b""
        self._header = (b"", b"")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0] + data[start:end], self._header[1])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0], self._header[1] + data[start:end])

    def _header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = (b"", b"")

    def _headers_finished(self) -> None:
        """The client's file name is not even read: the part's name says what it is."""
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not name:
            raise BadUpload("A part of the upload has no name: Content-Disposition must be form-data; name=...")
        if name not in PARTS:
            shown = re.sub(r"[^A-Za-z0-9._-]", "?", name[:64])
            if _FORBIDDEN.search(name):
                text = f"The part `{shown}` is not taken: templates, tokenizers and code are the base model's own."
                raise UploadRefused(text, param=shown)
            raise BadUpload(f"Unexpected part `{shown}`: an upload has `config` and `weights`, no others.", param=shown)
        if name in self._seen:
            raise BadUpload(f"The part `{name}` is there twice.", param=name)
        self._seen.add(name)
        self._part = name
        if name == "weights":
            self._file = cast(BinaryIO, self._path.open("wb"))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "weights" and self._file is not None:
            piece = data[start:end]
            self._file.write(piece)
            self.sha256.update(piece)
            return
        if len(self.config) + end - start > self._max_config:
            text = f"The part `config` is larger than {self._max_config} bytes."
            raise UploadRefused(text, code="bad_config", param="config")
        self.config += data[start:end]

    def _end_part(self) -> None:
        self.close()
        self._file = None
        self._part = None

    def _end(self) -> None:
        self._ended = True


def _quoted(names: list[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)
