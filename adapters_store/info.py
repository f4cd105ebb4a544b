"""What the store tells about an adapter."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that an uploader should know, though the adapter was accepted. `code` is stable."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class RankRange:
    min: int
    max: int


@dataclass(frozen=True, slots=True)
class ModuleCount:
    matched: int
    total: int


@dataclass(frozen=True, slots=True)
class BaseName:
    id: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter resolved: immutable, so one request sees one content from its first token to its last."""

    name: str
    version: int
    digest: str
    tenant: str = "public"


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One version of an adapter; `dataclasses.asdict` gives the JSON shape of the API.

    digest: SHA-256 of the manifest, the identity of the content; parameters: numbers in the file that act on the
    base; bytes: size of the weights file; created: ISO 8601, UTC; a deleted version has kind "deleted", no digest.
    """

    name: str
    version: int
    digest: str
    kind: str
    forms: tuple[str, ...]
    rank: RankRange
    modules: ModuleCount
    parameters: int
    bytes: int
    base: BaseName
    created: str
    event: str
    provenance: dict[str, Any]
    compression: dict[str, Any] | None
    warnings: tuple[Notice, ...]
